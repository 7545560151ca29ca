"Images in, predictions out."
import lazy_loader

# A name is imported when it is asked for: reading `--help` does not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "films": ["predict_video"],
        "folders": ["predict_files"],
        "outputs": ["read_map", "register_output"],
        "prediction": ["Prediction"],
        "predictor": ["Predictor"],
    },
)
