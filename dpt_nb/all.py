"What README, the lessons and the stories use: `from dpt_nb.all import *`. Everything else is imported from its room."

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
from dpt_nb.objective.losses import GradientMatchingLoss, SILogLoss, SSILoss, SegmentationLoss
from dpt_nb.objective.metrics import DepthMetrics, SegmentationMetrics, depth_errors
from dpt_nb.objective.normals import AngularLoss, NormalMetrics
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
from dpt_nb.training.loop import train
from dpt_nb.training.recipe_fields import Recipe, change_recipe
from dpt_nb.training.recipe_files import read_recipe, write_recipe
from dpt_nb.training.recipes import get_recipe, recipe_table
from dpt_nb.training.run_again import resume_run
from dpt_nb.deploy.engines import check_export, open_export
from dpt_nb.deploy.export import export
from dpt_nb.workbench.tabs import Workbench

__all__ = [
    "align_scale_shift",
    "AngularLoss",
    "attention_maps",
    "Backbone",
    "change_recipe",
    "check_datasets",
    "check_export",
    "color_depth",
    "color_label",
    "compare_runs",
    "convert",
    "count_parameters",
    "create_model",
    "Decoder",
    "depth_errors",
    "depth_panel",
    "depth_table",
    "DepthHead",
    "DepthMetrics",
    "DPT",
    "DPTConfig",
    "Entry",
    "evaluate",
    "export",
    "FileDataset",
    "Folder",
    "Fusion",
    "gallery",
    "get_recipe",
    "GradientMatchingLoss",
    "label_table",
    "launch",
    "lidar",
    "list_models",
    "load_backbone",
    "load_checkpoint",
    "make_miniature",
    "Mixture",
    "NormalMetrics",
    "open_dataset",
    "open_export",
    "panel",
    "predict_files",
    "predict_video",
    "Prediction",
    "Predictor",
    "Protocol",
    "PROTOCOLS",
    "random_scene",
    "read_depth",
    "read_image",
    "read_label",
    "read_map",
    "read_recipe",
    "Reassemble",
    "Recipe",
    "recipe_table",
    "render",
    "resume_run",
    "SegmentationHead",
    "SegmentationLoss",
    "SegmentationMetrics",
    "show_images",
    "show_label",
    "show_samples",
    "SILogLoss",
    "SSILoss",
    "train",
    "Workbench",
    "write_depth",
    "write_image",
    "write_label",
    "write_recipe",
]
