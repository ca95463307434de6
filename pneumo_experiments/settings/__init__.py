"""Every setting of the project, typed once.

A field of a dataclass here is the click option ``--name``, the MLflow project parameter ``-P name=…``, the
name in a config file and the logged param ``name``. Its type, meaning, limits and default stand nowhere else.

An entry point is a dataclass of fields and of groups, which are dataclasses, too. The names of all fields
below one entry point are unique, so that users need not know the groups.
"""

# These names are for other modules.
# ruff: noqa: F401
# pyright: reportUnusedImport=false
from pneumo_experiments.settings.config_file import (
    CONFIG,
    DEMO,
    config_text,
    entry_points_with,
    find_config,
    read_config,
    read_yaml,
    split_configs,
)
from pneumo_experiments.settings.entry_points import (
    BEST,
    ENTRY_POINTS,
    GetData,
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
    EARLIER_NAMES,
    NONE,
    Arg,
    Leaf,
    Settings,
    absolute,
    as_config,
    as_now,
    as_params,
    as_text,
    as_texts,
    checked,
    chosen,
    flat,
    from_flat,
    is_none,
    leaves,
    limits,
    parse,
    renamed,
    weight_shaping,
)
from pneumo_experiments.settings.groups import (
    Evaluation,
    GivenThresholds,
    ImageFormat,
    Registry,
    Schedule,
    SourceFiles,
    StudySettings,
)
from pneumo_experiments.settings.inputs import check_inputs, input_paths
from pneumo_experiments.settings.recipe import (
    Batches,
    Device,
    Network,
    Optimizer,
    Recipe,
    SplitSettings,
)
