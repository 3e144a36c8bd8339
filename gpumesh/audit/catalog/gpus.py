"""The explanations of codes about GPUs, the NVIDIA driver and nvidia-smi."""

from __future__ import annotations

from gpumesh.audit.catalog.explanation import E, Explanation, I, W

EXPLANATIONS = (
    Explanation(
        "gpu-missing",
        E,
        "no GPU is there",
        "A GPU was expected, or a driver is installed, and none is found.",
        "Check `lspci | grep -i nvidia` on the host. A container needs `--gpus all`; a pod may have been restarted "
        "without its GPU.",
    ),
    Explanation(
        "gpu-differs",
        W,
        "another GPU than expected",
        "nvidia-smi shows another model than `expect.gpu`.",
        "Check that this is the right machine; if it is, change `expect.gpu`.",
    ),
    Explanation(
        "gpu-count",
        E,
        "another number of GPUs",
        "nvidia-smi shows fewer or more GPUs than `expect.gpus`.",
        "Look for `NVRM: Xid` in the host's dmesg (one fell off the bus) and at the container's `--gpus`; or change "
        "`expect.gpus`.",
    ),
    Explanation(
        "vram-differs",
        W,
        "another amount of GPU memory",
        "A GPU's memory is more than 2 % off `expect.vram_mib`: a slice of a card (MIG, vGPU) or another model.",
        "Check what your provider sold you; if it is meant so, change `expect.vram_mib`.",
    ),
    Explanation(
        "driver-differs",
        I,
        "another driver version",
        "The NVIDIA driver's version is not `expect.driver`.",
        "If the update was meant, change `expect.driver`.",
    ),
    Explanation(
        "driver-broken",
        E,
        "the NVIDIA driver does not answer",
        "nvidia-smi is there, but cannot speak with the driver. Models then run on the CPU, if at all.",
        "Run `nvidia-smi` on the host. After a kernel update the module must be built again (`dkms autoinstall`, or "
        "reinstall the driver); `modprobe nvidia` loads it.",
    ),
    Explanation(
        "driver-mismatch",
        E,
        "driver and library are of different versions",
        "The driver was updated while its old kernel module is still loaded: NVML refuses.",
        "Reboot the host, or stop what uses the GPU and `rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia`, then "
        "`modprobe nvidia`.",
    ),
    Explanation(
        "driver-hung",
        E,
        "nvidia-smi does not answer",
        "nvidia-smi was started and gave no answer in time: the driver hangs, or wakes a sleeping GPU very slowly.",
        "Look at the host's `dmesg | grep -i -e nvrm -e xid`; a hung driver needs a reboot. `nvidia-smi -pm 1` keeps "
        "the driver awake.",
    ),
    Explanation(
        "login-shell-slow",
        W,
        "the account's login shell is slow",
        "Each session on the host begins with the account's login shell, and it has not come to our script yet: it "
        "still reads its start-up files (conda, pyenv, a home folder on a network disk), or a forced command runs in "
        "its place. The GPUs are not known until it is ready. Requests are served all the same.",
        "Time `ssh HOST true`. End ~/.bashrc at once in a session without a terminal: `case $- in *i*) ;; *) return;; "
        "esac` as its first line.",
    ),
    Explanation(
        "gpu-lost",
        E,
        "a GPU fell off the bus",
        "One GPU no longer answers on the PCI bus. Others on the same host are still shown.",
        "Reboot the host. If it comes back lost: power cable, seat, riser, heat; at a provider, ask for another.",
    ),
    Explanation(
        "gpu-cgroup-lost",
        E,
        "the container lost its GPU",
        "NVML says Unknown Error inside a container: its access to the device was taken away, mostly by a "
        "`systemctl daemon-reload` on its host.",
        "Restart the container. To prevent it, give the devices explicitly (`--device /dev/nvidia0 …`) or use CDI.",
    ),
    Explanation(
        "gpu-faulty",
        E,
        "a GPU reads errors",
        "nvidia-smi answers ERR! or Unknown Error where figures should be.",
        "Look for `NVRM: Xid` in dmesg; reset the GPU (`nvidia-smi -r`) or reboot; have it looked at if it returns.",
    ),
    Explanation(
        "gpu-throttled",
        W,
        "a GPU is slowed down",
        "The GPU lowers its clocks because of heat or its power supply.",
        "Check fans, air and power cable; a lower limit (`nvidia-smi -pl`) costs little speed and much heat.",
    ),
    Explanation(
        "gpu-inforom",
        W,
        "a GPU's infoROM is corrupted",
        "The GPU works, and its figures are good; part of its own records is damaged.",
        "Nothing urgent. Have the card looked at when it can be spared.",
    ),
    Explanation(
        "gpu-unreadable",
        E,
        "nvidia-smi says something else",
        "nvidia-smi ended well, but what it said is no table.",
        "Run `nvidia-smi` on the host, and see whether it is a wrapper script, or a shell that greets every command.",
    ),
    Explanation(
        "gpu-unknown",
        I,
        "the GPUs cannot be asked for",
        "There is no way to run nvidia-smi there: the node has no SSH, the host gives no session, or the account runs "
        "no commands (it is for forwarding only). Requests are served all the same.",
        "Give the node an `ssh:` section, if its GPU should be seen.",
    ),
    Explanation(
        "nvidia-smi-missing",
        W,
        "nvidia-smi is not there",
        "The host has no nvidia-smi on any usual path.",
        "Install the driver's utilities, or use an image that has them. A host without an NVIDIA GPU works without.",
    ),
    Explanation(
        "nvidia-smi-old",
        W,
        "nvidia-smi is too old",
        "It knows not even the fields that drivers have had since 2015.",
        "Update the NVIDIA driver.",
    ),
    Explanation(
        "persistence-off",
        I,
        "persistence mode is off",
        "When nothing uses the GPU, the driver unloads; the next call, nvidia-smi's too, then takes seconds.",
        "`nvidia-smi -pm 1` on the host, or enable the nvidia-persistenced service.",
    ),
)
