"""The configuration of a run: one immutable tree, read from a recipe and overrides, and checked before anything starts.

``schema`` declares every key. ``config_tree`` joins the sections and checks them against each other. ``loading`` reads a recipe
and overrides. ``recipes`` lists the shipped recipes.
"""

from scale_mae.config.config_tree import PACKAGE_DIR as PACKAGE_DIR
from scale_mae.config.config_tree import SHIPPED_CONFIGS as SHIPPED_CONFIGS
from scale_mae.config.config_tree import Config as Config
from scale_mae.config.errors import ConfigError as ConfigError
from scale_mae.config.errors import UserError as UserError
from scale_mae.config.loading import config_keys as config_keys
from scale_mae.config.loading import json_schema as json_schema
from scale_mae.config.loading import load_config as load_config
from scale_mae.config.loading import saved_config as saved_config
from scale_mae.config.recipes import recipe_names as recipe_names
from scale_mae.config.recipes import recipe_path as recipe_path
