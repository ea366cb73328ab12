"""dsprune as a library: gates on a live model, and the same choice cut away. Runs in a second, without a network."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import dsprune

torch.manual_seed(0)
config = BertConfig(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
model = BertForSequenceClassification(config).eval()
structure = dsprune.analyze(model)  # every parameter accounted for, or an error that names it
cost = dsprune.CostModel(structure)

gates = dsprune.ones(structure)  # head [L, H], attn [L], ffn [L], ffn_dim [L, F], hidden [d], qk_dim [L, H * D], ...
gates["head"][0, 1:] = 0  # keep one head in the first layer
gates["ffn"][3] = 0  # drop the last FFN sublayer
gates["hidden"][::4] = 0  # a quarter of the residual stream
print(f"encoder sparsity {float(cost.sparsity(gates)):.1%}, total {float(cost.sparsity(gates, of='total')):.1%}")

gating = dsprune.attach_gates(model, structure)  # the same model, masked
gating.set(gates)
batch = {"input_ids": torch.randint(5, 1000, (2, 16))}
masked = model(**batch).logits

selection = dsprune.Selection.from_gates(structure, gates)
compact = dsprune.apply_selection(model, selection)  # the same choice, cut away
print("largest difference below 1e-6:", bool((compact(**batch).logits - masked).abs().max() < 1e-6))
print("parameters", sum(p.numel() for p in compact.parameters()), "counted", int(cost.parameters(gates, of="total")))
