"""A finished model answers, with torch, transformers and safetensors alone: no dsprune needed.

python examples/classify.py runs/reviews/recovered "I would watch it again." "An hour too long."
"""

import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder, *texts = sys.argv[1:]
# A compact model brings the one file of code that its layers of unlike sizes need; read it before you trust it.
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    probabilities = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.softmax(-1)
for text, row in zip(texts, probabilities, strict=True):
    best = int(row.argmax())
    print(f"{model.config.id2label[best]} ({float(row[best]):.2f}): {text}")
