"""Chat templates: conversations as text and token ids."""
