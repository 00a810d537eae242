#!/usr/bin/env bash
# Makes a release in target/release-VERSION: the wheel, a tarball of the program for systems without Python, checksums, and the
# notes from CHANGELOG.md. Uploads nothing.
#
#     source kernels/cuda-env.sh && trainer/release.sh
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "$(git status --porcelain)" ]; then
    echo "there are changes that are in no commit: a release names the commit that it is built from" >&2
    exit 1
fi
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
out=$PWD/target/release-$version
rm -rf "$out" && mkdir -p "$out"

trainer/wheel.sh --out "$out"
wheel=$(echo "$out"/tandem-"$version"-*.whl)

# The program in the tarball is the wheel's.
name=tandem-$version-linux-x86_64
mkdir -p "$out/$name"
python3 -m zipfile -e "$wheel" "$out/wheel"
cp "$out"/wheel/tandem-"$version".data/scripts/tandem README.md CHANGELOG.md LICENSE "$out/$name"
cp -r recipes "$out/$name"
chmod +x "$out/$name/tandem"
tar -C "$out" -czf "$out/$name.tar.gz" "$name"
rm -r "$out/wheel" "${out:?}/$name"

# The first section of the changelog.
awk '/^## / { sections++; next } sections == 1' CHANGELOG.md > "$out/notes.md"
(cd "$out" && sha256sum ./*.whl ./*.tar.gz > SHA256SUMS)
ls -l "$out"
