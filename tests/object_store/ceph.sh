#!/bin/bash
# Starts, or starts again, a one-node Ceph object store with an S3 gateway on 127.0.0.1.
#
#   ROOT=/ DATA=/tmp/ceph PORT=19003 MON_PORT=19013 ACCESS_KEY=… SECRET_KEY=… bash ceph.sh
#
# ROOT is where the Debian packages radosgw, ceph-mon and ceph-osd are: / if they are installed, or a folder that they
# were unpacked in. Everything is kept under DATA; process ids lie in DATA/run/*.pid. Returns before the gateway listens.
# End it with kill -9: on SIGTERM it takes 40 s.
set -euo pipefail
: "${ROOT:?}" "${DATA:?}" "${PORT:?}" "${MON_PORT:?}" "${ACCESS_KEY:?}" "${SECRET_KEY:?}"
ROOT="${ROOT%/}"
lib="$ROOT/usr/lib/x86_64-linux-gnu"
export LD_LIBRARY_PATH="$lib:$lib/ceph:$ROOT/lib/x86_64-linux-gnu:$ROOT/usr/lib/ceph"
export PATH="$ROOT/usr/bin:$ROOT/usr/sbin:$PATH" CEPH_CONF="$DATA/ceph.conf"

new=
if [ ! -e "$DATA/ceph.conf" ]; then
  new=1
  mkdir -p "$DATA"/{mon,osd,run,log,rgw}
  fsid="$(cat /proc/sys/kernel/random/uuid)"
  cat > "$DATA/ceph.conf" <<C
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$MON_PORT/0]
public network = 127.0.0.0/8
ms bind ipv4 = true
ms bind port min = $((MON_PORT + 1))
ms bind port max = $((MON_PORT + 60))
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 500
mon data avail crit = 1
mon data = $DATA/mon
osd data = $DATA/osd
osd objectstore = bluestore
bluestore block size = 6442450944
bluestore cache autotune = false
bluestore cache size = 67108864
osd memory target = 939524096
osd class dir = $lib/rados-classes
erasure code dir = $lib/ceph/erasure-code
plugin dir = $lib/ceph
rgw data = $DATA/rgw
rgw frontends = beast endpoint=127.0.0.1:$PORT
rgw thread pool size = 32
rgw dns name = localhost
run dir = $DATA/run
admin socket = $DATA/run/\$name.asok
log file = $DATA/log/\$name.log
pid file = $DATA/run/\$name.own
keyring = $DATA/keyring
C
  ceph-authtool -C "$DATA/keyring" --gen-key -n client.admin \
    --cap mon 'allow *' --cap osd 'allow *' --cap mds 'allow *' --cap mgr 'allow *' > /dev/null
  ceph-authtool "$DATA/keyring" --gen-key -n client.rgw \
    --cap mon 'allow rwx' --cap osd 'allow rwx' --cap mgr 'allow rwx' > /dev/null
  ceph-authtool "$DATA/keyring" --gen-key -n osd.0 \
    --cap mon 'allow profile osd' --cap osd 'allow *' --cap mgr 'allow profile osd' > /dev/null
  cp "$DATA/keyring" "$DATA/mon.keyring"
  ceph-authtool "$DATA/mon.keyring" --gen-key -n mon. --cap mon 'allow *' > /dev/null
  monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$MON_PORT/0]" "$DATA/monmap" > /dev/null
  ceph-mon --mkfs -i a --monmap "$DATA/monmap" --keyring "$DATA/mon.keyring" --mon-data "$DATA/mon"
fi

# Started with their output in files: a caller that waits for this script's pipes must not wait for them.
start() {
  local name="$1"
  shift
  "$@" > "$DATA/log/$name.out" 2>&1 < /dev/null &
  echo $! > "$DATA/run/$name.pid"
}

start mon ceph-mon -f -i a
if [ -n "$new" ]; then
  uuid="$(cat /proc/sys/kernel/random/uuid)"
  PYTHONPATH="$ROOT/usr/lib/python3/dist-packages" timeout 120 /usr/bin/python3 "$ROOT/usr/bin/ceph" osd new "$uuid"
  ceph-osd -i 0 --mkfs --osd-uuid "$uuid" > "$DATA/log/mkfs.out" 2>&1
fi
start osd ceph-osd -f -i 0
if [ -n "$new" ]; then
  timeout 300 radosgw-admin user create --uid=tests --display-name=tests \
    --access-key="$ACCESS_KEY" --secret-key="$SECRET_KEY" > "$DATA/log/user.json" 2> "$DATA/log/user.err"
fi
start rgw radosgw -f -n client.rgw
