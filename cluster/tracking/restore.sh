#!/bin/sh
# Brings a backup back into an empty database and a bucket: restore.sh FOLDER
# Environment as for backup.sh. Stop the server first.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
[ -e "$1/database.dump" ] || { echo "$1: no backup of backup.sh" >&2; exit 2; }
: "${KNET_ARTIFACTS:?expected s3://BUCKET/PREFIX}"
python3 "$(dirname "$0")/bucket.py" upload "$1/artifacts" "$KNET_ARTIFACTS"
# One transaction: all of it or nothing; a database that is not empty is refused by its own tables.
pg_restore --no-owner --exit-on-error --single-transaction \
  --dbname "${PGDATABASE:-mlflow}" "$1/database.dump"
