"""An OpenAI client that sets SLOs per request: python examples/client.py [BASE_URL [API_KEY]]."""

import sys

from openai import OpenAI

BASE_URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
API_KEY = sys.argv[2] if len(sys.argv) > 2 else "none"

client = OpenAI(base_url=BASE_URL, api_key=API_KEY)
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Why is the sky blue?"}],
    max_tokens=32,
    stream=True,
    # First token within 2 s, 100 ms between tokens on average, all within 20 s of arrival.
    extra_headers={"x-slo-ttft-ms": "2000", "x-slo-tpot-ms": "100", "x-slo-e2e-ms": "20000"},
    # The last chunk then carries what the request was given.
    extra_body={"throttllem": {"metrics": True}},
)
metrics = None
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        sys.stdout.write(chunk.choices[0].delta.content)
    metrics = getattr(chunk, "metrics", None) or metrics
sys.stdout.write("\n")

if metrics:
    for name, value in metrics.items():
        sys.stdout.write(f"{name}: {value}\n")
