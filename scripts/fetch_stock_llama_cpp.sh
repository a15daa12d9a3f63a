#!/bin/sh
# Puts a build of llama.cpp with its own quantiser into a folder, for the tests to compare with.
# It is checked by its SHA-256 and nothing of it is run but the library.
set -eu
folder=$1
package=@node-llama-cpp/linux-x64@3.21.1
sha256=4b5b65a8b2611d8af94349b02d815c0f424a30a0a19aef2be5db25ecfef6730f

rm -rf "$folder"
mkdir -p "$folder"
cd "$folder"
archive=$(npm pack --silent "$package")
echo "$sha256  $archive" | sha256sum --check --quiet
tar -xzf "$archive" --strip-components=3 package/bins/linux-x64
rm "$archive"
