"""Every setting of the project, typed once.

A field of a dataclass here is the click option ``--name``, the MLflow project parameter ``-P name=…``, the
name in a config file and the logged param ``name``. Its type, meaning, limits and default stand nowhere else.

An entry point is a dataclass of fields and of groups, which are dataclasses, too. The names of all fields
below one entry point are unique, so that users need not know the groups.
"""

from pneumo_experiments.settings.config_file import CONFIG_HELP, DEMO, read_config, read_yaml
from pneumo_experiments.settings.entry_points import (
    BEST,
    ENTRY_POINTS,
    Main,
    Preprocess,
    Register,
    Sample,
    Score,
    Search,
    Train,
)
from pneumo_experiments.settings.fields import (
    AUTO,
    NONE,
    Arg,
    Leaf,
    Settings,
    absolute,
    as_config,
    as_params,
    as_text,
    checked,
    flat,
    from_flat,
    is_none,
    leaves,
    weight_shaping,
)
from pneumo_experiments.settings.groups import (
    Evaluation,
    GivenThresholds,
    ImageFormat,
    Reading,
    Registry,
    SampleSize,
    Schedule,
    SourceFiles,
    StudySettings,
)
from pneumo_experiments.settings.recipe import (
    Batches,
    Device,
    LossWeights,
    Network,
    Optimizer,
    Recipe,
    SplitSettings,
)

__all__ = [
    "AUTO",
    "BEST",
    "CONFIG_HELP",
    "DEMO",
    "ENTRY_POINTS",
    "NONE",
    "Arg",
    "Batches",
    "Device",
    "Evaluation",
    "GivenThresholds",
    "ImageFormat",
    "Leaf",
    "LossWeights",
    "Main",
    "Network",
    "Optimizer",
    "Preprocess",
    "Reading",
    "Recipe",
    "Register",
    "Registry",
    "Sample",
    "SampleSize",
    "Schedule",
    "Score",
    "Search",
    "Settings",
    "SourceFiles",
    "SplitSettings",
    "StudySettings",
    "Train",
    "absolute",
    "as_config",
    "as_params",
    "as_text",
    "checked",
    "flat",
    "from_flat",
    "is_none",
    "leaves",
    "read_config",
    "read_yaml",
    "weight_shaping",
]
