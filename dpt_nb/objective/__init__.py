"Losses, metrics and the alignment that both share."
import lazy_loader

# A name is imported when it is asked for: reading `--help` does not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "alignment": ["align_scale_shift"],
        "depth_losses": ["SILogLoss", "SSILoss"],
        "depth_metrics": ["DepthMetrics"],
        "gradient_matching": ["GradientMatchingLoss"],
        "metrics": ["depth_errors"],
        "normals": ["AngularLoss", "NormalMetrics"],
        "segmentation_losses": ["SegmentationLoss"],
        "segmentation_metrics": ["SegmentationMetrics"],
    },
)
