"""Data sets behind an address (s3://, file://): fetched once to a machine, shared by its trials.

`staged` lets a block read one; `fingerprint` and `num_train_images` tell what a plan needs and
fetch no more than the annotations. Data sets in folders are read where they are.
"""

from knet_platform.staging.cache import Cache, SetState
from knet_platform.staging.stage import fingerprint, num_train_images, staged

__all__ = ["Cache", "SetState", "fingerprint", "num_train_images", "staged"]
