"""Every error davir_ray raises on purpose.

    DavirError
    ├── UserError            the user's mistake: one line, exit status 2
    │   ├── ConfigError      an option is missing, misspelt, out of range or contradicts another
    │   ├── DataError        the input cannot be read, or too much of it is bad
    │   ├── ModelError       a checkpoint cannot be used, or base and reference do not belong together
    │   ├── OutputError      the output holds another run, or cannot be written
    │   ├── ClusterError     the cluster does not have what the settings ask for
    │   └── TrainingError    the fine-tune diverged
    ├── ProgressError        nothing finished within the time limit, so the run counts as stuck: exit status 1
    ├── StorageError         disk or network failed during a run, which the same command continues: exit status 1
    └── IntegrityError       row counts do not reconcile, or a committed file is damaged: exit status 1

Each message says what is wrong, the value seen and what to change. The classes take one string, so that they survive
pickling between Ray workers and the driver.
"""


class DavirError(Exception):
    """Root of the tree; catch it to catch everything that davir_ray raises on purpose."""


class UserError(DavirError):
    """The user can correct this; the command line prints it as one line and exits with status 2."""


class ConfigError(UserError):
    """An option is missing, misspelt, out of range or contradicts another."""


class DataError(UserError):
    """The input cannot be read, or too much of it is bad."""


class ModelError(UserError):
    """A checkpoint cannot be used, or base and reference do not belong together."""


class OutputError(UserError):
    """The output holds another run, or cannot be written."""


class ClusterError(UserError):
    """The cluster does not have what the settings ask for."""


class TrainingError(UserError):
    """The fine-tune diverged: its loss is not finite."""


class ProgressError(DavirError):
    """Nothing finished within the time limit, so the run counts as stuck."""


class StorageError(DavirError):
    """Disk or network failed during a run; the same command continues it."""


class IntegrityError(DavirError):
    """Row counts do not reconcile, or a committed file no longer matches its checksum."""
