#!/bin/sh
# Copies the database and the bucket into a new folder: backup.sh FOLDER
# PGHOST, PGUSER and PGPASSWORD (or ~/.pgpass) say which database; KNET_ARTIFACTS which bucket.
# The database goes first: runs that begin meanwhile may then have files too many, never too few.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
[ ! -e "$1" ] || { echo "$1: exists; expected a new folder" >&2; exit 2; }
: "${KNET_ARTIFACTS:?expected s3://BUCKET/PREFIX}"
umask 077
mkdir -p "$1.unfinished"
pg_dump --format custom --no-owner --file "$1.unfinished/database.dump" "${PGDATABASE:-mlflow}"
python3 "$(dirname "$0")/bucket.py" download "$KNET_ARTIFACTS" "$1.unfinished/artifacts"
mv "$1.unfinished" "$1"
