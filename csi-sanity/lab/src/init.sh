# Process 1 of a machine: init NAME DIR. Its namespaces are new, its network is empty, its mounts reach nobody else.
set -eu
name=$1 dir=$2

# As on a real node, mounts made here reach containers that ask for it (mountPropagation).
mount --make-rshared /
hostname "$name"
for path in /var/lib /var/log /run /opt /srv /mnt; do
    mkdir -p "$dir/disk$path" "$path"
    # What a reboot empties.
    [ "$path" = /run ] && rm -rf "$dir/disk/run" && mkdir -p "$dir/disk/run"
    mount --bind "$dir/disk$path" "$path"
done
mount --make-rshared /
ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
: > "$dir/ready"

# Orphans of the machine come to us.
trap : TERM INT
while :; do sleep 3600 & wait || :; done
