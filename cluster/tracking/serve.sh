#!/bin/sh
# Becomes MLflow's server. What differs between places comes by environment, secrets as files in
# KNET_SECRETS: database_password, admin_password, session_key.
set -eu
secrets=${KNET_SECRETS:-/run/secrets}
port=${KNET_PORT:-5000}

# libpq reads PGHOST, PGPORT and PGPASSWORD: no password is in an address, a log or a process list.
PGPASSWORD=$(cat "$secrets/database_password")
MLFLOW_AUTH_ADMIN_PASSWORD=$(cat "$secrets/admin_password")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$secrets/session_key")
export PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
database="postgresql+psycopg2://${PGUSER:-mlflow}@/${PGDATABASE:-mlflow}"

# Accounts lie in the same database, so that one backup has both.
umask 077
MLFLOW_AUTH_CONFIG_PATH=$(mktemp)
export MLFLOW_AUTH_CONFIG_PATH
cat > "$MLFLOW_AUTH_CONFIG_PATH" <<INI
[mlflow]
default_permission = EDIT
database_uri = $database
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
INI

# Parts of large files go from the trainers to the bucket by signed addresses.
export MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD=true
export MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD=true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false  # evaluates language models; 235 MB of memory

exec mlflow server --app-name basic-auth --host "${KNET_BIND:-0.0.0.0}" --port "$port" \
  --workers "${KNET_WORKERS:-4}" --backend-store-uri "$database" \
  --artifacts-destination "$KNET_ARTIFACTS" --allowed-hosts "$MLFLOW_SERVER_ALLOWED_HOSTS"
