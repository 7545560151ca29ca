"Every published checkpoint format in; ours and the common ones out."
import lazy_loader

# A name is imported when it is asked for: reading `--help` does not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "load": ["load_backbone", "load_checkpoint"],
        "write": ["convert"],
    },
)
