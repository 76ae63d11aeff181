"""Kernels of policy optimization: log-probs, policy loss and advantages, fp32-exact and bitwise repeatable.

Every op takes `backend=None`: Triton kernels for CUDA tensors, the plain-torch version for CPU tensors. A backend can
be named ("torch", "triton", and "triton_fused" for the log-probs); Triton on CPU tensors runs under its interpreter,
which must be switched on (`TRITON_INTERPRET=1`) before triton is first imported.
"""

from dppo_kernels.group_advantages import group_advantages
from dppo_kernels.linear_logprob import linear_logprob
from dppo_kernels.linear_policy_loss import linear_policy_loss
from dppo_kernels.policy_loss import SumCount, policy_loss

__all__ = ["SumCount", "group_advantages", "linear_logprob", "linear_policy_loss", "policy_loss"]
