"""From a composed config to checked dataclasses, and back to `config.yaml`."""
