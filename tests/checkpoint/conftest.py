from tests.helpers.optimizers import new_model, option, options  # noqa: F401
