#!/bin/bash
# Creates the role of the service. The Postgres image runs this when it creates its data; `regcred migrate --grant-to`
# grants the rights.
set -euo pipefail
psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
    -v password="$REGCRED_SERVICE_PASSWORD" <<'SQL'
CREATE ROLE regcred_service LOGIN PASSWORD :'password';
SQL
