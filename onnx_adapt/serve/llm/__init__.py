"""A language model in onnxruntime-genai's form, served as OpenAI's and vLLM's servers are."""
