"""What sites would send to Flower's own strategies, so that ours can stand beside them."""

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from wardround.update import State


def replies(tensors: Mapping[str, State], examples: Mapping[str, float]) -> list[Message]:
    """Return each site's tensors as a reply to a training message, with its number of examples."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # without it, Message() raises
    return [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord({name: Array(array) for name, array in own.items()}),
                    "metrics": MetricRecord({"num-examples": examples[site]}),
                }
            ),
            dst_node_id=1,
            message_type="train",
        )
        for site, own in tensors.items()
    ]
