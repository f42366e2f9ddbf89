#!/bin/sh
# Writes .env and secrets/ for compose.yaml: init.sh HOST[,HOST...] s3://BUCKET/PREFIX [FOLDER]
# What is there already stays, so that the same again changes no password.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 HOST[,HOST...] s3://BUCKET/PREFIX [FOLDER]" >&2; exit 2; }
case $2 in s3://*) ;; *) echo "$2: expected s3://BUCKET/PREFIX" >&2; exit 2 ;; esac
here=$(cd "$(dirname "$0")" && pwd)
folder=${3:-$here}
umask 077
mkdir -p "$folder/secrets"
for name in database_password admin_password session_key; do
  file=$folder/secrets/$name
  [ -s "$file" ] || python3 -c 'import secrets; print(secrets.token_urlsafe(24), end="")' > "$file"
done
if [ -e "$folder/.env" ]; then
  echo "$folder/.env: is there already; kept" >&2
else
  sed -e "s|^MLFLOW_SERVER_ALLOWED_HOSTS=.*|MLFLOW_SERVER_ALLOWED_HOSTS=$1|" \
    -e "s|^KNET_ARTIFACTS=.*|KNET_ARTIFACTS=$2|" "$here/env.example" > "$folder/.env"
fi
echo "admin's password: $folder/secrets/admin_password"
