"""What a site may push: the answer to a message that it was sent, as large as an answer can be.

SuperLink 1.41 keeps until the run's end whatever a registered key pushes: any number of objects below a root that is no
message, and messages in another's name, the server's among them.
"""

from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

LARGEST_OBJECT = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 2**20  # bytes, with the request around it
LARGEST_MESSAGE = 2**18  # bytes: the hashes of 3,600 objects, an answer of 18 GB
_FRAME = 16  # objects; an answer has five beside the pieces of its array


def most_objects(state: int) -> int:
    """Return how many objects a site's answer may have, for a state of so many bytes: twice what the largest has.

    The largest is an update of float32 with control variates, each as large as the state.

    >>> most_objects(342_000_000)
    276
    """
    return _FRAME + 2 * (2 * state // FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE)


def is_answer(body: bytes, most: int) -> bool:
    """Return whether a request to push a message holds one answer by the node that asks, of at most so many objects.

    Its objects hang below the message, so that SuperLink deletes them with it; and it takes one answer a message.
    """
    asked = PushMessagesRequest()
    try:
        asked.ParseFromString(body)
    except DecodeError:
        return False
    if (len(asked.messages_list), len(asked.message_object_trees)) != (1, 1):
        return False
    said, tree = asked.messages_list[0].metadata, asked.message_object_trees[0]
    own = said.src_node_id == asked.node.node_id and said.reply_to_message_id != ""
    return own and tree.object_id == said.message_id and sum(1 for _ in iterate_object_tree(tree)) <= most
