"""Write the Kubernetes manifest (a JobSet) that trains a config on TPU slices.

Each slice is a Job, and each of its hosts is a pod. The cluster needs JobSet
0.10.1 or later, which supports patterns in the failure policy. Overrides of the
config are written into the manifest. docs/pods.md describes the other steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import yaml

from msllm.cli.base import Parser, Switch, execute, non_negative_int, output_file, positive_int
from msllm.config import Config
from msllm.errors import UserError
from msllm.model.model import abstract_model
from msllm.pod.aot import topology_devices
from msllm.sharding import make_mesh
from msllm.streams import StreamSpec, resolve_visibility

_EXAMPLES = """
python launch/gke/jobset.py --config=configs/8b_v5e_256.py --topology=v5e:16x16 \\
  --image=IMAGE --name=mine --workdir=gs://BUCKET/mine | kubectl apply -f -
"""
LAUNCH = pathlib.Path(__file__).resolve().parent.parent
JOB = "slice"  # the name of the replicated job; the coordinator is NAME-slice-0-0.NAME
PORTS = {
    "tpu": 8471,  # libtpu
    "jax": 8482,  # the coordinator (jax/_src/clusters/cloud_tpu_cluster.py)
    "megascale": 8080,  # libtpu between slices
}
STEP_SECONDS = 60  # to finish a step and wait for all hosts before writing the checkpoint
WRITE_BYTES_PER_SECOND = 50e6  # of a host, an assumed minimum


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice as GKE describes it."""

    accelerator: str  # value of the label cloud.google.com/gke-tpu-accelerator
    topology: str  # chips along each axis, such as 16x16
    hosts: int
    chips_per_host: int


def describe(topology: str, devices: Sequence[Any], num_slices: int) -> Slice:
    """The slice of a topology such as `v5e:16x16`. Raises UserError for a topology that GKE lacks.

    Args:
      topology: generation and chips along each axis.
      devices: the devices of all slices, from the TPU compiler.
      num_slices: the number of slices.
    """
    generation, _, shape = topology.partition(":")
    rows = [
        line.split()
        for line in (LAUNCH / "tpus.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    accelerators = {row[0]: row[3] for row in rows}
    if generation not in accelerators:
        raise UserError(
            f"--topology is {topology!r}: the generation must be one of {', '.join(accelerators)} "
            "(launch/tpus.txt)"
        )
    places = {(getattr(device, "slice_index", 0), device.process_index) for device in devices}
    hosts = len(places) // num_slices
    chips = math.prod(map(int, shape.split("x")))
    return Slice(accelerators[generation], shape, hosts, chips // hosts)


def grace_seconds(config: Config, hosts: int) -> int:
    """How long a pod may take to end, in seconds: one step and its share of the checkpoint.

    A checkpoint has 12 bytes per parameter: the parameter and AdamW's two moments, in float32. Each
    host of a slice writes an equal share.
    """
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 32768)
    streams = StreamSpec.from_config(resolve_visibility(config).streams)
    _, parameters, _ = abstract_model(model, streams)
    size = 12 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))
    return STEP_SECONDS + 30 * math.ceil(size / hosts / WRITE_BYTES_PER_SECOND / 30)


def environment(num_slices: int, name: str) -> list[dict[str, Any]]:
    """The variables of the container: the tpu lines of flags.env, and the addresses of slices.

    GKE sets the position of each pod within its slice (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES). With
    several slices, jax and libtpu also read the MEGASCALE variables
    (jax/_src/clusters/cloud_tpu_cluster.py). The index of a slice is the index of its Job.
    """
    lines = [
        line.removeprefix("tpu ")
        for line in (LAUNCH / "flags.env").read_text().splitlines()
        if line.startswith("tpu ")
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
    variables: Mapping[str, str] | None = None,
    secrets: Sequence[str] = (),
) -> dict[str, Any]:
    """The JobSet as nested dicts. Raises UserError for a name that Kubernetes refuses.

    Args:
      name: the name of the JobSet, with which the names of its pods begin.
      image: the container image.
      arguments: the arguments of `msllm train`.
      shape: the slice.
      num_slices: the number of slices.
      grace: seconds that a pod may take to end.
      restarts: the maximum number of restarts after a process has died.
      service_account: the Kubernetes service account of the pods.
      data_bucket: a bucket to mount at /data.
      spot: run on Spot VMs.
      host_network: use the network of the nodes.
      variables: environment variables of the container.
      secrets: Kubernetes Secrets, whose entries become environment variables.
    """
    # The name of a pod becomes a label, which has at most 63 characters.
    longest = 63 - len(f"-{JOB}-{num_slices - 1}-{shape.hosts - 1}-abcde")
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > longest:
        raise UserError(
            f"--name is {name!r}: lower-case letters, digits and hyphens, a letter first, at most "
            f"{longest} characters (it begins the names of the pods)"
        )
    container = {
        "name": "msllm",
        "image": image,
        "command": ["python", "-m", "msllm", "train", *map(_literal, arguments)],
        "env": environment(num_slices, name)
        + [{"name": key, "value": _literal(value)} for key, value in (variables or {}).items()],
        "ports": [{"name": key, "containerPort": port} for key, port in PORTS.items()],
        "resources": {"limits": {"google.com/tpu": shape.chips_per_host}},
        # The loader passes batches through shared memory. The default of a container is 64 MiB.
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    if secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in secrets]
    pod = {
        "restartPolicy": "Never",  # a single pod cannot continue: all are restarted together
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
        # FailJob gives the failure policy below a reason to act on: bad input, saved on request, or
        # a lost node.
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
        "maxRestarts": restarts,  # for failures that match no rule: a process died
        "restartStrategy": "BlockingRecreate",  # old pods occupy the chips until they are gone
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
            # Each slice has a node pool to itself.
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


def _literal(text: str) -> str:
    """Escapes text that Kubernetes would expand: it replaces $(VARIABLE), and $$ by $."""
    return text.replace("$", "$$")


def _variable(text: str) -> tuple[str, str]:
    """Flag type: VARIABLE=VALUE. The manifest is no place for secrets."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise argparse.ArgumentTypeError(f"is {text!r}: must be VARIABLE=VALUE")
    if re.search("_((api_?)?key|token|secret|passwd|password)_", f"_{name}_", re.IGNORECASE):
        raise argparse.ArgumentTypeError(
            f"is for {name}, which the manifest and the command line would show: keep it in a "
            "Kubernetes Secret and give --secret=NAME"
        )
    return name, value


def _name(text: str) -> str:
    """Flag type: the name of a Kubernetes object, of a bucket or of an image."""
    if not re.fullmatch("[A-Za-z0-9]([A-Za-z0-9._/:@-]*[A-Za-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"is {text!r}: letters, digits and the characters ._/:@-, with a letter or digit at "
            "both ends"
        )
    return text


def _file_in_image(config_file: str) -> str:
    """The path of a config in the image, which has the folder configs of this repository.

    Raises UserError if the file is elsewhere.
    """
    file, colon, argument = config_file.partition(":")
    path = pathlib.Path(file).resolve()
    if not path.is_relative_to(LAUNCH.parent / "configs"):
        raise UserError(
            f"--config is {config_file!r}: the image has only files of {LAUNCH.parent / 'configs'}"
            " (launch/gke/Dockerfile); copy it there"
        )
    return f"{path.relative_to(LAUNCH.parent)}{colon}{argument}"


def _parse_flags() -> argparse.Namespace:
    parser = Parser("python launch/gke/jobset.py", __doc__ or "", _EXAMPLES)
    parser.add_config()
    for name, metavar, text in (
        ("topology", "NAME", "Topology of a slice, as for msllm aot, e.g. v5e:16x16 or v5p:4x4x4."),
        ("image", "NAME", "Container image, made with launch/gke/Dockerfile."),
        ("name", "NAME", "Name of the JobSet; pods are named after it."),
        ("workdir", "PLACE", "Folder for checkpoints and metrics, gs://BUCKET/FOLDER."),
    ):
        kind = _name if name == "image" else str
        parser.add_argument(f"--{name}", metavar=metavar, required=True, type=kind, help=text)
    parser.add_argument(
        "--num_slices",
        metavar="N",
        type=positive_int,
        default=1,
        help="Number of slices of that topology.",
    )
    parser.add_argument(
        "--restarts",
        metavar="N",
        type=non_negative_int,
        default=20,
        help="Maximum number of restarts after a process has died. Preemptions do not count.",
    )
    parser.add_argument(
        "--grace",
        metavar="SECONDS",
        type=positive_int,
        help="Time for a pod that must end to finish its step and save. Default: from the size "
        "of the model.",
    )
    parser.add_argument(
        "--service_account",
        metavar="NAME",
        type=_name,
        help="Kubernetes service account of the pods, with access to the workdir.",
    )
    parser.add_argument(
        "--data_bucket",
        metavar="BUCKET",
        type=_name,
        help="A bucket to mount at /data, for --config.data.dir=/data/FOLDER (Cloud Storage FUSE).",
    )
    parser.add_argument(
        "--env",
        metavar="VARIABLE=VALUE",
        type=_variable,
        action="append",
        default=[],
        help="An environment variable of the pods, beside the tpu lines of launch/flags.env. "
        "Repeatable.",
    )
    parser.add_argument(
        "--secret",
        metavar="NAME",
        type=_name,
        action="append",
        default=[],
        help="A Kubernetes Secret, whose entries become environment variables of the pods. "
        "Repeatable.",
    )
    for name, text in (
        ("initialization_timeout", "Passed on to msllm train."),
        ("heartbeat_timeout", "Passed on to msllm train."),
    ):
        parser.add_argument(f"--{name}", metavar="SECONDS", type=positive_int, help=text)
    parser.add_argument("--spot", action=Switch, default=False, help="Run on Spot VMs.")
    parser.add_argument(
        "--host_network",
        action=Switch,
        default=False,
        help="Use the nodes' network, as GKE's examples for several slices do.",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=output_file,
        help="File to write. Default: print the manifest.",
    )
    parser.add_argument(
        "--dry-run", action=Switch, default=False, help="Print the manifest; do not write --out."
    )
    return parser.parse(sys.argv[1:])


def _main() -> None:
    flags = _parse_flags()
    if not re.match(r"gs://.|/.", flags.workdir):
        raise UserError(
            f"--workdir is {flags.workdir!r}: all pods must see the same place; give "
            "gs://BUCKET/FOLDER or the full path of a volume that the image mounts"
        )
    jax.config.update("jax_platforms", "cpu")
    devices = topology_devices(flags.topology, flags.num_slices)
    shape = describe(flags.topology, devices, flags.num_slices)
    if flags.num_slices > 1 and shape.hosts == 1:
        raise UserError(
            f"--num_slices is {flags.num_slices}: GKE connects only slices of several hosts, and "
            f"{flags.topology} has one: choose a larger topology"
        )
    make_mesh(flags.config.mesh, devices)  # the mesh must fit these devices
    timeouts = [
        f"--{name}={getattr(flags, name)}"
        for name in ("initialization_timeout", "heartbeat_timeout")
        if getattr(flags, name) is not None
    ]
    written = manifest(
        flags.name,
        flags.image,
        [
            f"--config={_file_in_image(flags.config_file)}",
            f"--workdir={flags.workdir}",
            *flags.overrides,
            *timeouts,
        ],
        shape,
        flags.num_slices,
        flags.grace or grace_seconds(flags.config, shape.hosts),
        flags.restarts,
        flags.service_account,
        flags.data_bucket,
        flags.spot,
        flags.host_network,
        dict(flags.env),
        flags.secret,
    )
    content = yaml.safe_dump(written, sort_keys=False, width=120)
    if flags.out and not flags.dry_run:
        flags.out.write_text(content, encoding="utf-8")
    else:
        print(content, end="")


if __name__ == "__main__":
    sys.exit(execute(_main))
