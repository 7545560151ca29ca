"Every public name of every chapter, for notebooks: `from dpt_nb.all import *`."
from dpt_nb.images import *
from dpt_nb.scenes import *
from dpt_nb.patch_embed import *
from dpt_nb.backbone import *
from dpt_nb.reassemble import *
from dpt_nb.fusion import *
from dpt_nb.heads import *
from dpt_nb.models import *
from dpt_nb.checkpoints import *
from dpt_nb.losses import *
from dpt_nb.metrics import *
from dpt_nb.transforms import *
from dpt_nb.datasets import *
from dpt_nb.inference import *
from dpt_nb.evaluation import *
from dpt_nb.recipes import *
from dpt_nb.training import *
