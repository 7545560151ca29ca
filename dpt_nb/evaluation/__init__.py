"One way to evaluate."
import lazy_loader

# A name is imported when it is asked for: reading `--help` does not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "evaluate": ["depth_table", "label_table", "normal_table", "panel", "report_tables"],
        "head_metrics": ["register_metric"],
        "protocols": ["PROTOCOLS", "Protocol"],
    },
)
