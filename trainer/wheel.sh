#!/usr/bin/env bash
# Builds the wheel of the program with CUDA: target/wheels/tandem-VERSION-py3-none-manylinux_2_28_x86_64.whl.
#
#     source kernels/cuda-env.sh && trainer/wheel.sh
#
# Needs what a build with CUDA needs, and python3 with venv. It runs where glibc is 2.28 or newer, whatever this machine has: the
# linker is zig's, which knows the symbols of each glibc, and C++'s library is linked in.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=$PWD/target/wheel-tools
if [ ! -e "$tools/ready" ]; then
    python3 -m venv "$tools" && "$tools/bin/pip" install --quiet 'maturin>=1.16,<2' 'ziglang>=0.15'
    touch "$tools/ready"
fi

# rustc links with the first `cc` on PATH. What crates compile from C is left to the system's: only the link binds to a glibc.
mkdir -p "$tools/linker"
# What GCC's C++ library asks of glibc 2.32 and newer; 0 is "there may be several threads".
echo 'char __libc_single_threaded;' | cc -c -fPIC -x c - -o "$tools/linker/glibc.o"
cat > "$tools/linker/cc" <<LINKER
#!/usr/bin/env bash
arguments=()
for argument in "\$@"; do
    case \$argument in
        -c | -E | -S) exec "$(command -v cc)" "\$@" ;;
        -lstdc++) arguments+=("$(g++ -print-file-name=libstdc++.a)") ;;
        # zig does not look for an archive behind these, as GNU's linker does.
        -Wl,-Bdynamic | -Wl,-Bstatic) ;;
        *) arguments+=("\$argument") ;;
    esac
done
exec "$tools/bin/python" -m ziglang cc -s -target x86_64-linux-gnu.2.28 "\${arguments[@]}" "$tools/linker/glibc.o"
LINKER
chmod +x "$tools/linker/cc"
export PATH=$tools/linker:$PATH

TANDEM_COMMIT=$(git rev-parse --short=10 HEAD 2>/dev/null || true)
export TANDEM_COMMIT
"$tools/bin/maturin" build --release --manifest-path trainer/Cargo.toml "${@:---out=target/wheels}"
