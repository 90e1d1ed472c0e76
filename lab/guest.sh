# shellcheck shell=busybox
# The first program of a guest: builds the root file system that the command sees, then runs the command.
#
# virtme-ng gives us the host's file system read-only over 9p without a cache, in which importing pytest takes ten
# seconds. So we mount the host a second time with a cache, put the sysroot over it, and a tmpfs over both: everything
# has its usual path, everything can be written, and nothing but the repository reaches the host.
#
# Run by a static busybox, whose tools need no second file: from the uncached mount every other one costs 100 ms.
#
# usage: busybox sh guest.sh RUN REPOSITORY KERNEL ports|terminal
#   RUN  directory of this run; holds the script `command`, receives `exit-code`; shared without a cache
set -eu
run=$1 repository=$2 kernel=$3 streams=$4
busybox=$repository/.cache/sysroot/usr/bin/busybox
"$busybox" mkdir /run/lab
"$busybox" cp "$busybox" /run/lab
/run/lab/busybox --install -s /run/lab
PATH=/run/lab

# Without udev nobody makes /dev/virtio-ports, so look for the port of that name.
find_port() {
    for port in /sys/class/virtio-ports/*; do
        read -r name <"$port/name" && [ "$name" = "$1" ] && echo "/dev/${port##*/}" && return
    done
}
[ "$streams" = terminal ] || exec </dev/null >"$(find_port lab.stdout)" 2>"$(find_port lab.stderr)"

ninep=trans=virtio,version=9p2000.L,msize=512000,access=any,cache=loose
mount -t tmpfs lab /mnt
mkdir /mnt/host /mnt/repository /mnt/scratch /mnt/scratch/upper /mnt/scratch/work /mnt/root
mount -t 9p -o "ro,$ninep" lab.host /mnt/host
mount -t 9p -o "rw,$ninep" lab.repository /mnt/repository

# The sysroot comes from the mount of the repository: overlayfs refuses two layers of which one contains the other.
layers=/mnt/repository/.cache/sysroot:/mnt/host
mount -t overlay -o "lowerdir=$layers,upperdir=/mnt/scratch/upper,workdir=/mnt/scratch/work" lab /mnt/root
cd /mnt/root
mount -t tmpfs -o mode=1777 tmp tmp
mkdir -p "./$repository"
mount -o move /mnt/repository "./$repository"
mount -o bind "./$repository/.cache/kernels/$kernel/lib/modules" usr/lib/modules
mount -o bind "$run" "./$run"
for directory in proc sys dev run; do mount -o rbind "/$directory" "$directory"; done

# Not chroot: the kernel refuses to make a user namespace in one, and tests do that.
pivot_root . mnt
umount -l /mnt

ip link set lo up
mkdir -p /run/lock /run/netns
code=0
"$run/command" || code=$?
sync
echo "$code" >"$run/exit-code"
