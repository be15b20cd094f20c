"""Isolates a process with the Linux kernel, through ctypes: namespaces, its own root, limits, no privileges.

There are three steps, each more restrictive than the one before:
`enter_namespaces` once for a worker, `enter_job` for each program, `confine` in the program's own process. A fourth,
`system_calls.refuse`, blocks system calls.
"""

import ctypes
import glob
import os
import pathlib
import re
import resource
import struct
import sys
from collections.abc import Callable, Mapping

NOBODY = 65534
SCRATCH = "/tmp"  # the only place a program can write to

# linux/sched.h, linux/mount.h, linux/prctl.h, linux/fcntl.h
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 2, 4, 0x4000, 0x40000, 2
_OPEN_TREE_CLONE, _AT_RECURSIVE, _MOVE_MOUNT_F_EMPTY_PATH, _AT_FDCWD = 1, 0x8000, 4, -100
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
# Numbers that all architectures share; glibc got names for them late or never.
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_CAPABILITY_VERSION_3 = 0x20080522
_LINKS = ("/lib", "/lib64")  # to folders of the same name in /usr, on most systems


def enter_namespaces(wait_for_id_maps: Callable[[], None]) -> None:
    """Leaves the machine's users, network, host name and files; the process can still set up its children.

    Files that remain, read-only: Python's standard library, the folders of the shared libraries that Python has loaded,
    and time zones.

    Args:
      wait_for_id_maps: returns when the parent has called `write_id_maps` for this process.

    Raises:
      OSError: the kernel does not allow it.
    """
    if os.geteuid() == 0:
        os.setgroups([])
    _call("unshare", _NEWUSER | _NEWNS | _NEWNET | _NEWUTS)
    wait_for_id_maps()
    # No user namespaces below this one: they would give capabilities back.
    pathlib.Path("/proc/sys/user/max_user_namespaces").write_text("0", encoding="ascii")
    # Still the user that started this, who may read a standard library in a private folder.
    trees = {path: _clone_tree(path) for path in [*_readable_folders(), "/dev/null", "/dev/urandom"]}
    links = _links()
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)

    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _mount_tmpfs("/tmp", "size=1m,mode=755")
    os.chdir("/tmp")
    for path, tree in trees.items():
        target = path.lstrip("/")
        if path.startswith("/dev/"):
            os.makedirs("dev", exist_ok=True)
            pathlib.Path(target).touch()
        else:
            os.makedirs(target)
        _syscall(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH)
        os.close(tree)
        for packages in _package_folders(target):
            _mount_tmpfs(packages, "size=0,mode=755")
    for path, target in links.items():
        os.symlink(target, path.lstrip("/"))
    os.makedirs(SCRATCH.lstrip("/"))
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")
    read_only = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    _syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, read_only, len(read_only))


def write_id_maps(pid: int) -> None:
    """Maps only the caller's user, as nobody, into a process's new user namespace.

    Root becomes nobody outside, too: a process of root's could escape limits and write root's files.
    """
    process = pathlib.Path("/proc", str(pid))
    (process / "setgroups").write_text("deny", encoding="ascii")
    for name, caller in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        (process / name).write_text(f"{NOBODY} {caller or NOBODY} 1", encoding="ascii")


def enter_job(disk: int) -> None:
    """Enters an empty folder in memory and namespaces for the processes to come; gives up all capabilities.

    The caller's first child is number 1 of its namespace: when it ends, all its descendants are killed.

    Args:
      disk: capacity of the folder, in bytes.
    """
    _call("unshare", _NEWNS | _NEWPID | _NEWIPC)
    _mount_tmpfs(SCRATCH, f"size={disk},nr_inodes=1024,mode=700")
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _call("capset", header, bytes(24))


def confine(limits: Mapping[str, int]) -> None:
    """Limits this process and its children; none can gain privileges."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    hard = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["disk"],
        resource.RLIMIT_NPROC: limits["processes"] + 2,  # the worker and the judge are the same user
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_SIGPENDING: 64,  # timers, too: the kernel's memory
    }
    for which, value in hard.items():
        ceiling = resource.getrlimit(which)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(which, (value, value))


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent ends."""
    _call("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent ends."""
    _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _readable_folders() -> list[str]:
    """Returns folders of the standard library (all of `sys.path`, see `_START`) and shared libraries; none nested."""
    maps = pathlib.Path("/proc/self/maps").read_text(encoding="utf-8")
    loaded = re.findall(r" (/.*)/[^/]+\.so[.\d]*$", maps, re.MULTILINE)
    links = tuple(f"{path}/" for path in _links())
    wanted = {
        os.path.realpath(path) if path.startswith(links) else path
        for path in ["/usr/share/zoneinfo", *sys.path, *loaded]
        if os.path.isdir(path)
    }
    return [path for path in sorted(wanted) if not any(path.startswith(f"{other}/") for other in wanted)]


def _package_folders(path: str) -> list[str]:
    """Returns folders of installed packages inside a folder of libraries."""
    return [name for depth in ("", "python3*/") for name in glob.glob(f"{glob.escape(path)}/{depth}*-packages")]


def _links() -> dict[str, str]:
    """Returns `/lib` and the like that are links, and their targets."""
    return {path: os.readlink(path) for path in _LINKS if os.path.islink(path)}


def _clone_tree(path: str) -> int:
    return _syscall(_SYS_OPEN_TREE, _AT_FDCWD, path.encode(), _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC)


def _mount_tmpfs(target: str, options: str) -> None:
    _call("mount", b"tmpfs", target.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options.encode())


def _call(name: str, *arguments: int | bytes | ctypes.c_long | None) -> int:
    """Returns a function of the C library that returns -1 and sets errno if it fails."""
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _syscall(number: int, *arguments: int | bytes) -> int:
    return _call("syscall", ctypes.c_long(number), *arguments)
