"Data sets and what becomes of a sample."
import lazy_loader

# A name is imported when it is asked for: reading `--help` does not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checks": ["check_datasets", "show_samples"],
        "datasets": ["Entry", "FileDataset"],
        "folder": ["Folder"],
        "registry": ["make_miniature", "open_dataset"],
        "sampling": ["Mixture"],
    },
)
