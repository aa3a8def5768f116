"""The paper's loop closed live without a GPU: a real vLLM at a modelled GPU's speed, keeper, gateway, a real client."""
