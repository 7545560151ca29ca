"A network without this library."
import lazy_loader

# A name is imported when it is asked for: reading `--help` does not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "engines": ["check_export", "open_export"],
        "quantization": ["quantization_error", "quantize"],
    },
)
