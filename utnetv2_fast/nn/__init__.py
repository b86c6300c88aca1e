"""The modules of UTNetV2, in 2D and 3D from one set, made of `utnetv2_fast.ops`."""

from utnetv2_fast.nn.bidirectional_attention import BidirectionalAttention, BidirectionalAttentionBlock
from utnetv2_fast.nn.convolution import DepthwiseConv, DepthwiseSeparableConv, MBConv, ResidualBlock
from utnetv2_fast.nn.semantic_map import SemanticMapFusion, SemanticMapGeneration
from utnetv2_fast.nn.stages import PatchMerging

__all__ = [
    "BidirectionalAttention",
    "BidirectionalAttentionBlock",
    "DepthwiseConv",
    "DepthwiseSeparableConv",
    "MBConv",
    "PatchMerging",
    "ResidualBlock",
    "SemanticMapFusion",
    "SemanticMapGeneration",
]
