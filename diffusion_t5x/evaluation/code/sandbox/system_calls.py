"""A seccomp filter for the system calls that a program's processes must not make.

It closes the gaps of namespaces and limits: the user's keyrings, kernel interfaces known for their holes, and memory
that counts for no process. A refused call fails with an error number, as for a user without privileges, so Python
raises OSError and the program continues.
"""

import ctypes
import errno
import os
import platform
import struct

# x86-64 and AArch64 are the machines that JAX has Linux wheels for. AUDIT_ARCH_* of linux/audit.h.
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Numbers on x86-64 and AArch64; None where a machine has no such call.
_REFUSED = {
    # Keyrings belong to users, not to namespaces, and outlive a program.
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    # Memory outside the limit on address space.
    **{"shmget": (29, 194), "shmctl": (31, 195), "shmat": (30, 196), "shmdt": (67, 197)},
    **{"semget": (64, 190), "semctl": (66, 191), "semtimedop": (220, 192), "semop": (65, 193)},
    **{"msgget": (68, 186), "msgctl": (71, 187), "msgrcv": (70, 188), "msgsnd": (69, 189)},
    **{"mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447)},
    # Other processes.
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"inotify_init": (253, None), "inotify_init1": (294, 26)},  # they see who else opens Python's library
    **{"pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448)},
    # Mounts and namespaces.
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51)},
    **{"unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429)},
    **{"fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433)},
    **{"mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265)},
    # Programs and work inside the kernel.
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "fanotify_init": (300, 262)},
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106)},
    **{"kexec_load": (246, 104), "kexec_file_load": (320, 294)},
    # The machine: clocks, swap, disks, quotas, its log, placement of memory, old interfaces of x86.
    **{"reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "syslog": (103, 116)},
    **{"settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171)},
    **{"sethostname": (170, 161), "setdomainname": (171, 162), "quotactl": (179, 60), "quotactl_fd": (443, 443)},
    **{"sync": (162, 81), "personality": (135, 92), "lookup_dcookie": (212, 18), "vhangup": (153, 58)},
    **{"mbind": (237, 235), "set_mempolicy": (238, 237), "set_mempolicy_home_node": (450, 450)},
    **{"migrate_pages": (256, 238), "move_pages": (279, 239)},
    **{"iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "uselib": (134, None)},
}
# The network namespace holds off addresses of the internet. Families of other sockets lead past it (vsock: to the host
# of a virtual machine) or deep into the kernel.
_SOCKET, _SOCKETPAIR = (41, 198), (53, 199)
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
# Higher numbers are newer than this list, or of x86-64's second table (x32). C libraries do without them.
_NEWEST = 450

# linux/filter.h, linux/seccomp.h
_LOAD, _IF_EQUAL, _IF_ABOVE, _RETURN = 0x20, 0x15, 0x25, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little-endian
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PR_GET_SECCOMP, _PR_SET_SECCOMP, _MODE_FILTER = 21, 22, 2


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def check() -> None:
    """Raises OSError if a filter cannot be made: another architecture, or a kernel without seccomp."""
    _filter()
    _prctl(_PR_GET_SECCOMP, 0, None)


def refuse() -> None:
    """Filters the system calls of this process and its children, which must already have given up new privileges."""
    instructions = _filter()
    _prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(_Program(len(instructions) // 8, instructions)))


def _filter() -> bytes:
    """Returns the instructions, 8 bytes each."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}, only for {' and '.join(_ARCHITECTURES)}")
    column, architecture = _ARCHITECTURES[machine]
    refused = [numbers[column] for numbers in _REFUSED.values() if numbers[column] is not None]
    # (operation, operand, where to go if so, where to go if not): names are places, None is the next instruction.
    steps = [
        (_LOAD, _ARCHITECTURE, None, None),
        (_IF_EQUAL, architecture, None, "unknown"),
        (_LOAD, _NUMBER, None, None),
        (_IF_ABOVE, _NEWEST, "unknown", None),
        *((_IF_EQUAL, number, "refused", None) for number in refused),
        *((_IF_EQUAL, numbers[column], "socket", None) for numbers in (_SOCKET, _SOCKETPAIR)),
        (_RETURN, _ALLOW, None, None),
    ]
    places = {"socket": len(steps)}
    steps.append((_LOAD, _FIRST_ARGUMENT, None, None))
    steps += [(_IF_EQUAL, family, "allowed", None) for family in _FAMILIES]
    ends = {
        "no family": _ERRNO | errno.EAFNOSUPPORT,
        "allowed": _ALLOW,
        "refused": _ERRNO | errno.EPERM,
        "unknown": _ERRNO | errno.ENOSYS,
    }
    for place, result in ends.items():
        places[place] = len(steps)
        steps.append((_RETURN, result, None, None))

    def jump(place: str | None, here: int) -> int:
        return 0 if place is None else places[place] - here - 1

    return b"".join(
        struct.pack("HBBI", operation, jump(yes, here), jump(no, here), operand)
        for here, (operation, operand, yes, no) in enumerate(steps)
    )


def _prctl(option: int, value: int, pointer: object) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, pointer, 0, 0) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
