"""Writes the Kubernetes manifest (a JobSet) that trains a config on TPU slices of GKE.

    python launch/gke/jobset.py --config=configs/8b_v5e_256.py --topology=v5e:16x16 --image=IMAGE --name=mine \
      --workdir=gs://BUCKET/mine [--num_slices=2] [--config.optim.lr=1e-3 ...] | kubectl apply -f -

A slice is a Job, a host of it a pod. Needs JobSet 0.10.1 or later in the cluster (patterns of its failure policy).
Overrides of the config go into the manifest. docs/pods.md leads through the rest.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import yaml

from msllm.config import Config
from msllm.errors import UserError
from msllm.model.model import abstract_model
from msllm.pod.aot import topology_devices
from msllm.sharding import make_mesh
from msllm.streams import StreamSpec

LAUNCH = pathlib.Path(__file__).resolve().parent.parent
JOB = "slice"  # the name of the replicated job; the host that coordinates is NAME-slice-0-0.NAME
PORTS = {
    "tpu": 8471,
    "jax": 8482,
    "megascale": 8080,
}  # libtpu's, jax's (cloud_tpu_cluster.py) and libtpu's between slices
# To finish a step and to gather everybody before the checkpoint is written; what a host writes at least, bytes/s.
STEP_SECONDS, HOST_WRITES = 60, 50e6


@dataclasses.dataclass(frozen=True)
class Slice:
    """What GKE must know of a slice."""

    accelerator: str  # value of the label cloud.google.com/gke-tpu-accelerator
    topology: str  # chips along each axis, 16x16
    hosts: int
    chips_per_host: int


def describe(topology: str, devices: Sequence[Any], num_slices: int) -> Slice:
    """The slice of a topology such as `v5e:16x16`, whose devices the TPU compiler has named. Raises UserError."""
    generation, _, shape = topology.partition(":")
    rows = [
        line.split()
        for line in (LAUNCH / "tpus.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    accelerators = {row[0]: row[3] for row in rows}
    if generation not in accelerators:
        raise UserError(
            f"--topology is {topology!r}: GKE is known to have {', '.join(accelerators)} (launch/tpus.txt)"
        )
    hosts = (
        len({(getattr(device, "slice_index", 0), device.process_index) for device in devices})
        // num_slices
    )
    return Slice(
        accelerators[generation], shape, hosts, math.prod(map(int, shape.split("x"))) // hosts
    )


def grace_seconds(config: Config, hosts: int) -> int:
    """How long a pod may take to end: a step, and the checkpoint, of which every host of a slice writes its share.

    12 bytes a parameter: it and AdamW's two moments, in float32.
    """
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 32768)
    _, parameters, _ = abstract_model(model, StreamSpec.from_config(config.streams))
    size = 12 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))
    return STEP_SECONDS + 30 * math.ceil(size / hosts / HOST_WRITES / 30)


def environment(num_slices: int, name: str) -> list[dict[str, Any]]:
    """Variables of the container: those of flags.env for TPUs, and how the slices find each other.

    GKE tells every pod its place within the slice (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES). Of slices, jax and libtpu read
    the MEGASCALE variables (jax/_src/clusters/cloud_tpu_cluster.py); the index of a slice is that of its Job.
    """
    lines = [
        line.removeprefix("tpu ")
        for line in (LAUNCH / "flags.env").read_text().splitlines()
        if line[:4] == "tpu "
    ]
    variables = [
        {"name": key, "value": value} for key, _, value in (line.partition("=") for line in lines)
    ]
    if num_slices > 1:
        index = {"fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/job-index']"}}
        variables += [
            {"name": "MEGASCALE_COORDINATOR_ADDRESS", "value": f"{name}-{JOB}-0-0.{name}"},
            {"name": "MEGASCALE_NUM_SLICES", "value": str(num_slices)},
            {"name": "MEGASCALE_SLICE_ID", "valueFrom": index},
        ]
    return variables


def manifest(
    name: str,
    image: str,
    arguments: Sequence[str],
    shape: Slice,
    num_slices: int,
    grace: int,
    restarts: int,
    service_account: str | None = None,
    data_bucket: str | None = None,
    spot: bool = False,
    host_network: bool = False,
) -> dict[str, Any]:
    """The JobSet. `arguments`: of `msllm train`. Raises UserError."""
    longest = 63 - len(
        f"-{JOB}-{num_slices - 1}-{shape.hosts - 1}-abcde"
    )  # a pod's name is a label: 63 characters
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > longest:
        raise UserError(
            f"--name is {name!r}: lower-case letters, digits and hyphens, a letter first, at most {longest} characters "
            "(pods are named after it)"
        )
    container = {
        "name": "msllm",
        "image": image,
        "command": ["python", "-m", "msllm", "train", *arguments],
        "env": environment(num_slices, name),
        "ports": [{"name": key, "containerPort": port} for key, port in PORTS.items()],
        "resources": {"limits": {"google.com/tpu": shape.chips_per_host}},
        # The loader's processes hand batches over in shared memory, of which a container has 64 MiB by itself.
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",  # a pod alone cannot go on: all start again
        "terminationGracePeriodSeconds": grace,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": shape.accelerator,
            "cloud.google.com/gke-tpu-topology": shape.topology,
        },
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    annotations = {}
    if service_account:
        pod["serviceAccountName"] = service_account
    if data_bucket:
        annotations["gke-gcsfuse/volumes"] = "true"
        attributes = {"bucketName": data_bucket, "mountOptions": "implicit-dirs"}
        driver = {
            "driver": "gcsfuse.csi.storage.gke.io",
            "readOnly": True,
            "volumeAttributes": attributes,
        }
        pod["volumes"].append({"name": "data", "csi": driver})
        container["volumeMounts"].append({"name": "data", "mountPath": "/data", "readOnly": True})
    if spot:
        label = "cloud.google.com/gke-spot"
        pod["nodeSelector"][label] = "true"
        pod["tolerations"] = [
            {"key": label, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    if host_network:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}

    def on_exit(code: int) -> dict[str, Any]:
        codes = {"containerName": "msllm", "operator": "In", "values": [code]}
        return {"action": "FailJob", "onExitCodes": codes}

    job = {
        "parallelism": shape.hosts,
        "completions": shape.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # FailJob gives the JobSet a reason to tell apart below: bad input, saved on request, node taken away.
        "podFailurePolicy": {
            "rules": [
                on_exit(2),
                on_exit(75),
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"metadata": {"annotations": annotations}, "spec": pod}
        if annotations
        else {"spec": pod},
    }
    policy = {
        "maxRestarts": restarts,  # of what no rule names: a process died
        "restartStrategy": "BlockingRecreate",  # the old pods hold the chips until they are gone
        "rules": [
            {
                "name": "bad_input",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": ["failed with exit code 2 "],
            },
            {
                "name": "preempted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
            },
        ],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            # A slice has a node pool for itself.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": policy,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": JOB, "replicas": num_slices, "template": {"spec": job}}],
        },
    }


def _main() -> None:
    from absl import flags
    from ml_collections import config_flags

    from msllm.config import from_config_dict
    from msllm.errors import run

    settings = config_flags.DEFINE_config_file(
        "config", None, "Settings of the run, as the image has them."
    )
    text = {
        name: flags.DEFINE_string(name, None, said)
        for name, said in (
            ("topology", "Of a slice, as for msllm aot: v5e:16x16, v6e:8x8, v5p:4x4x4, ..."),
            ("image", "Made with launch/gke/Dockerfile."),
            ("name", "Of the JobSet; pods are named after it."),
            ("workdir", "gs://BUCKET/FOLDER for checkpoints and metrics."),
            (
                "service_account",
                "Kubernetes service account of the pods, with access to the workdir.",
            ),
            (
                "data_bucket",
                "A bucket to mount at /data, for --config.data.dir=/data/FOLDER (Cloud Storage FUSE).",
            ),
            ("out", "File for the manifest; without it, it is printed."),
        )
    }
    num_slices = flags.DEFINE_integer("num_slices", 1, "Slices of that topology.")
    restarts = flags.DEFINE_integer(
        "restarts", 20, "Restarts after a process has died; preemptions do not count."
    )
    grace = flags.DEFINE_integer(
        "grace",
        None,
        "Seconds in which a pod that must end may finish its step and save; default: by the config's size.",
    )
    spot = flags.DEFINE_boolean("spot", False, "Run on Spot VMs.")
    host_network = flags.DEFINE_boolean(
        "host_network", False, "Use the nodes' network, as GKE's examples for several slices do."
    )
    dry_run = flags.DEFINE_boolean("dry-run", False, "Print the manifest; do not write --out.")

    def main(_) -> int:
        if not settings.value:
            raise UserError("--config is missing: name a file, e.g. --config=configs/8b_v5e_256.py")
        for name in ("topology", "image", "name", "workdir"):
            if not text[name].value:
                raise UserError(
                    f"--{name} is missing: {text[name].help[0].lower()}{text[name].help[1:]}"
                )
        for flag, least in ((num_slices, 1), (restarts, 0), (grace, 1)):
            if flag.value is not None and flag.value < least:
                raise UserError(f"--{flag.name} is {flag.value}: must be at least {least}")
        if not re.match(r"gs://.|/.", text["workdir"].value):
            raise UserError(
                f"--workdir is {text['workdir'].value!r}: all pods must see the same place; give gs://BUCKET/FOLDER or "
                "the full path of a volume that the image mounts"
            )
        jax.config.update("jax_platforms", "cpu")
        devices = topology_devices(text["topology"].value, num_slices.value)
        shape = describe(text["topology"].value, devices, num_slices.value)
        if num_slices.value > 1 and shape.hosts == 1:
            raise UserError(
                f"--num_slices is {num_slices.value}: GKE joins slices of many hosts; {text['topology'].value} has one"
            )
        config = from_config_dict(settings.value)
        make_mesh(config.mesh, devices)  # the mesh must fit these devices
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        overrides = [word for word in sys.argv[1:] if re.match(r"--config\.\S+?=", word)]
        written = manifest(
            text["name"].value,
            text["image"].value,
            [f"--config={path}", f"--workdir={text['workdir'].value}", *overrides],
            shape,
            num_slices.value,
            grace.value or grace_seconds(config, shape.hosts),
            restarts.value,
            text["service_account"].value,
            text["data_bucket"].value,
            spot.value,
            host_network.value,
        )
        content = yaml.safe_dump(written, sort_keys=False, width=120)
        if text["out"].value and not dry_run.value:
            pathlib.Path(text["out"].value).write_text(content, encoding="utf-8")
        else:
            print(content, end="")
        return 0

    run(main)


if __name__ == "__main__":
    _main()
