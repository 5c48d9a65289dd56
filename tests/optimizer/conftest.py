from tests.helpers.optimizers import new_model, option, options, weights_of  # noqa: F401
