# Sets up CUDA 13.0 for building and running Tandem without root, from NVIDIA's packages on PyPI: the compiler, the libraries,
# cuDNN, and the C++ headers of cuDNN's front end. About 3 GB in ~/.cache/tandem-cuda, once; needs python3 with venv.
# The NVIDIA driver (580 or newer) comes from your distribution and must be there already.
#
#     source kernels/cuda-env.sh          # in each shell that builds or runs Tandem
#     cargo build --release --features cuda

tandem_cuda=${TANDEM_CUDA:-$HOME/.cache/tandem-cuda}
if [ ! -e "$tandem_cuda/ready" ]; then
    python3 -m venv "$tandem_cuda" && "$tandem_cuda/bin/pip" install --quiet --no-cache-dir \
        nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.0.2.14 nvidia-curand==10.4.0.35 \
        nvidia-cudnn-cu13==9.19.0.56 nvidia-cudnn-frontend==1.32.0 || return 1
    # The linker looks for names without a version, which the packages leave out.
    for library in "$tandem_cuda"/lib/python3*/site-packages/nvidia/cu13/lib/*.so.*; do
        unversioned=${library%%.so.*}.so
        [ -e "$unversioned" ] || ln -s "$(basename "$library")" "$unversioned"
    done
    for library in "$tandem_cuda"/lib/python3*/site-packages/nvidia/cu13/lib; do
        ln -sfn lib "${library}64"
    done
    touch "$tandem_cuda/ready"
fi
# The driver's library is linked by a name that not every distribution has.
tandem_driver=$(ldconfig -p | awk '/libcuda\.so\.1 /{print $NF; exit}')
if [ -n "$tandem_driver" ]; then
    for tandem_folder in "$tandem_cuda"/lib/python3*/site-packages/nvidia/cu13/lib; do
        ln -sf "$tandem_driver" "$tandem_folder/libcuda.so"
    done
else
    echo "no NVIDIA driver was found (libcuda.so.1): install it before you build with --features cuda" >&2
fi
tandem_packages=$(echo "$tandem_cuda"/lib/python3*/site-packages)
export CUDA_HOME=$tandem_packages/nvidia/cu13
export CUDA_PATH=$CUDA_HOME CUDA_ROOT=$CUDA_HOME CUDA_TOOLKIT_ROOT_DIR=$CUDA_HOME
export PATH=$CUDA_HOME/bin:$PATH
export CUDNN_INCLUDE=$tandem_packages/nvidia/cudnn/include CUDNN_FRONTEND_INCLUDE=$tandem_packages/include
export LIBRARY_PATH=$CUDA_HOME/lib${LIBRARY_PATH:+:$LIBRARY_PATH}
export LD_LIBRARY_PATH=$CUDA_HOME/lib:$tandem_packages/nvidia/cudnn/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# candle's own kernels are compiled for one architecture, whose PTX runs on all newer cards.
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}
unset tandem_packages tandem_driver tandem_folder
