# mteditflow with what a GPU and a judge need; without a GPU it trains the miniature. How to use it: docs/start.md
FROM python:3.12-slim

# Triton and torch.compile compile what they generate
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /source/
COPY mteditflow /source/mteditflow
COPY kernels /source/kernels
RUN pip install --no-cache-dir "/source[gpu,judge,data]"

COPY configs /work/configs
WORKDIR /work
ENTRYPOINT ["mteditflow"]
CMD ["train"]
