"""The exceptions a user can cause, each with a message that says where, what and what to do."""


class PolygroundError(Exception):
    """Base of everything the command line prints as one clear line instead of a traceback."""


class ConfigError(PolygroundError):
    """A recipe or an override is wrong: the key and the remedy are in the message."""


class DataError(PolygroundError):
    """A row, an annotation or an image is wrong: file, row and remedy are in the message."""


class ModelError(PolygroundError):
    """A model folder cannot be used: the path and the remedy are in the message."""


class StorageError(PolygroundError):
    """A run folder cannot be read or continued: the path and the remedy are in the message."""


class EndpointError(ModelError):
    """A server that samples cannot be used, or answers no longer: its address, what it said and the remedy are in the message."""


class BudgetError(EndpointError):
    """What the recipe allows to be spent on a server is spent; what was answered is kept."""
