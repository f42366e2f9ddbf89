#!/usr/bin/env bash
# Installs what the lock says, for the image: install.sh cuda|cpu LOCK. The CPU variant takes torch and
# torchvision in the locked versions from PyTorch's own index, whose wheels go together and bring no CUDA
# (3 GB less); that index' hashes are not in the lock.
set -euo pipefail
variant="$1" lock="$2"
of_cuda='^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)=='

# A requirement's further lines are indented.
without_cuda() { awk -v pattern="$of_cuda" '/^[^ ]/ { keep = $0 !~ pattern } keep' "$lock"; }
locked() { awk -F '==| ' -v name="$1" '$1 == name { print name "==" $2 }' "$lock"; }

case "$variant" in
  cuda) uv pip install --require-hashes --no-deps --compile-bytecode --requirements "$lock" ;;
  cpu)
    without_cuda > /tmp/cpu.lock
    uv pip install --require-hashes --no-deps --compile-bytecode --requirements /tmp/cpu.lock
    uv pip install --no-deps --compile-bytecode --index-url https://download.pytorch.org/whl/cpu \
      "$(locked torch)" "$(locked torchvision)"
    ;;
  *) echo "install.sh: got '$variant', expected cuda or cpu" >&2; exit 2 ;;
esac
