"""What README, the lessons and the stories use: `from dpt_nb.all import *`. Everything else is imported from its room."""
from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for editors and type checkers, which read and do not run
    from dpt_nb.images.colors import color_depth, color_label, depth_panel, show_images, show_label
    from dpt_nb.images.images import read_depth, read_image, read_label, write_depth, write_image, write_label
    from dpt_nb.scenes.raycast import lidar, render
    from dpt_nb.scenes.scenes import random_scene
    from dpt_nb.network.backbone import Backbone
    from dpt_nb.network.config import DPTConfig
    from dpt_nb.network.dpt import DPT
    from dpt_nb.network.fusion import Decoder, Fusion
    from dpt_nb.network.heads import DepthHead, SegmentationHead
    from dpt_nb.network.inside import attention_maps
    from dpt_nb.network.reassemble import Reassemble
    from dpt_nb.network.zoo import count_parameters, create_model, list_models
    from dpt_nb.weights.load import load_backbone, load_checkpoint
    from dpt_nb.weights.write import convert
    from dpt_nb.objective.alignment import align_scale_shift
    from dpt_nb.objective.depth_losses import SILogLoss, SSILoss
    from dpt_nb.objective.depth_metrics import DepthMetrics
    from dpt_nb.objective.gradient_matching import GradientMatchingLoss
    from dpt_nb.objective.metrics import depth_errors
    from dpt_nb.objective.normals import AngularLoss, NormalMetrics
    from dpt_nb.objective.segmentation_losses import SegmentationLoss
    from dpt_nb.objective.segmentation_metrics import SegmentationMetrics
    from dpt_nb.data.checks import check_datasets, show_samples
    from dpt_nb.data.datasets import Entry, FileDataset
    from dpt_nb.data.folder import Folder
    from dpt_nb.data.registry import make_miniature, open_dataset
    from dpt_nb.data.sampling import Mixture
    from dpt_nb.inference.films import predict_video
    from dpt_nb.inference.folders import predict_files
    from dpt_nb.inference.outputs import read_map
    from dpt_nb.inference.prediction import Prediction
    from dpt_nb.inference.predictor import Predictor
    from dpt_nb.evaluation.evaluate import depth_table, evaluate, label_table, panel
    from dpt_nb.evaluation.gallery import gallery
    from dpt_nb.evaluation.protocols import PROTOCOLS, Protocol
    from dpt_nb.training.compare_runs import compare_runs
    from dpt_nb.training.launch import launch
    from dpt_nb.training.run import train
    from dpt_nb.training.recipe_fields import Recipe, change_recipe
    from dpt_nb.training.recipe_files import read_recipe, write_recipe
    from dpt_nb.training.recipes import get_recipe, recipe_table
    from dpt_nb.training.run_again import resume_run
    from dpt_nb.deploy.engines import check_export, open_export
    from dpt_nb.deploy.export import export
    from dpt_nb.workbench.tabs import Workbench

ROOMS = {  # room → what it gives
    "images.colors": ["color_depth", "color_label", "depth_panel", "show_images", "show_label"],
    "images.images": ["read_depth", "read_image", "read_label", "write_depth", "write_image", "write_label"],
    "scenes.raycast": ["lidar", "render"],
    "scenes.scenes": ["random_scene"],
    "network.backbone": ["Backbone"],
    "network.config": ["DPTConfig"],
    "network.dpt": ["DPT"],
    "network.fusion": ["Decoder", "Fusion"],
    "network.heads": ["DepthHead", "SegmentationHead"],
    "network.inside": ["attention_maps"],
    "network.reassemble": ["Reassemble"],
    "network.zoo": ["count_parameters", "create_model", "list_models"],
    "weights.load": ["load_backbone", "load_checkpoint"],
    "weights.write": ["convert"],
    "objective.alignment": ["align_scale_shift"],
    "objective.depth_losses": ["SILogLoss", "SSILoss"],
    "objective.depth_metrics": ["DepthMetrics"],
    "objective.gradient_matching": ["GradientMatchingLoss"],
    "objective.metrics": ["depth_errors"],
    "objective.normals": ["AngularLoss", "NormalMetrics"],
    "objective.segmentation_losses": ["SegmentationLoss"],
    "objective.segmentation_metrics": ["SegmentationMetrics"],
    "data.checks": ["check_datasets", "show_samples"],
    "data.datasets": ["Entry", "FileDataset"],
    "data.folder": ["Folder"],
    "data.registry": ["make_miniature", "open_dataset"],
    "data.sampling": ["Mixture"],
    "inference.films": ["predict_video"],
    "inference.folders": ["predict_files"],
    "inference.outputs": ["read_map"],
    "inference.prediction": ["Prediction"],
    "inference.predictor": ["Predictor"],
    "evaluation.evaluate": ["depth_table", "evaluate", "label_table", "panel"],
    "evaluation.gallery": ["gallery"],
    "evaluation.protocols": ["PROTOCOLS", "Protocol"],
    "training.compare_runs": ["compare_runs"],
    "training.launch": ["launch"],
    "training.run": ["train"],
    "training.recipe_fields": ["Recipe", "change_recipe"],
    "training.recipe_files": ["read_recipe", "write_recipe"],
    "training.recipes": ["get_recipe", "recipe_table"],
    "training.run_again": ["resume_run"],
    "deploy.engines": ["check_export", "open_export"],
    "deploy.export": ["export"],
    "workbench.tabs": ["Workbench"],
}

# A room is imported when one of its names is asked for: of all of them, by the star.
__getattr__, __dir__, __all__ = lazy_loader.attach("dpt_nb", submod_attrs=ROOMS)
