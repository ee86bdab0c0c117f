//! The container image: the recipe makes the binary; the image's root directory has what the Dockerfile copies and
//! nothing else; and the daemon runs there with the mounts and capabilities that the DaemonSet gives it: without an
//! engine, and in a container of podman's, from an image of buildah's. What the latter does not show: the kubelet and
//! containerd, AppArmor and SELinux, and other machines than this one's kind.

use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::core::v1::{PodSpec, VolumeMount};
use serde::Deserialize as _;

use crate::laboratory::api_cluster::ApiCluster;
use crate::laboratory::cluster::{all, names};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::{Lab, cgroup, eventually, kustomize, lab_binary, netns, preflight, skip};

const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");
/// The API server's name, to be asked of DNS, and another that is in /etc/hosts.
const BY_DNS: &str = "api.cluster.test";
const BY_FILE: &str = "api.hosts.test";

/// The recipe, with the profile that the tests are built with. Cargo sees to it that a second run does nothing.
fn binary() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    // Of what cargo tells a test, much would make another cargo build the crates anew that look at it.
    let told = |name: &str| name == "OUT_DIR" || name.starts_with("CARGO") && name != "CARGO_HOME";
    let told_by_cargo = std::env::vars().map(|(name, _)| name).filter(|name| told(name));
    let mut make = Command::new("make");
    for name in told_by_cargo {
        make.env_remove(name);
    }
    let make = make
        .args(["-C", REPOSITORY, "image-binary", "IMAGE_PROFILE=dev", "IMAGE_FLAGS=--features lab"])
        .env("CARGO_TARGET_DIR", target)
        .output()
        .unwrap();
    assert!(make.status.success(), "{}", String::from_utf8_lossy(&make.stderr));
    target.join("image/debug/kubelane")
}

/// What the Dockerfile's last stage copies into the image, with `binary` for what its first stage builds. Also the
/// directories that a runtime makes: mount points, and what the kubelet mounts for every pod.
fn image(root: &Path, binary: &Path, pod: &PodSpec) {
    let dockerfile = fs::read_to_string(Path::new(REPOSITORY).join("manifests/image/Dockerfile")).unwrap();
    let (_, last) = dockerfile.split_once("\nFROM scratch\n").expect("the last stage begins with nothing");
    for line in last.lines().filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["COPY", "--from=build", "/src/target/static/$TARGETARCH/kubelane", to] => copy(binary, &below(root, to)),
            ["COPY", from, to] => copy(&Path::new(REPOSITORY).join(from), &below(root, to)),
            ["ARG" | "LABEL", ..] => {}
            ["ENTRYPOINT", entry] => assert_eq!(entry, r#"["/kubelane"]"#),
            _ => panic!("{line}"),
        }
    }
    let mounts = pod.containers[0].volume_mounts.iter().flatten().map(|mount| mount.mount_path.as_str());
    for directory in mounts.chain(["/proc", "/sys", "/var/run/secrets/kubernetes.io/serviceaccount"]) {
        // What is below /sys is there when the runtime has mounted it.
        if !directory.starts_with("/sys/") {
            fs::create_dir_all(below(root, directory)).unwrap();
        }
    }
    fs::write(root.join("etc/hosts"), format!("127.0.0.1 localhost {BY_FILE}\n")).unwrap();
    fs::write(root.join("etc/resolv.conf"), "nameserver 127.0.0.1\n").unwrap();
    let account = root.join("var/run/secrets/kubernetes.io/serviceaccount");
    fs::write(account.join("token"), "a-token").unwrap();
    fs::copy(Path::new(REPOSITORY).join("tests/data/ca.crt"), account.join("ca.crt")).unwrap();
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.strip_prefix('/').unwrap())
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(from, to).unwrap();
}

fn pod() -> PodSpec {
    let objects = kustomize::build(&Path::new(REPOSITORY).join("manifests/base"));
    let daemon_set = objects.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    PodSpec::deserialize(&daemon_set["spec"]["template"]["spec"]).unwrap()
}

/// The DaemonSet's mounts as options of `kubelane-lab contain`; the laboratory's BPF file system stands for the host's.
fn binds(pod: &PodSpec, bpffs: &Path, config: &Path) -> Vec<String> {
    let bind = |mount: &VolumeMount| {
        let volume = pod.volumes.iter().flatten().find(|volume| volume.name == mount.name).unwrap();
        let source = match (&volume.host_path, &volume.config_map) {
            (Some(host), None) if host.path == "/sys/fs/bpf" => bpffs.to_owned(),
            // Empty, it goes with the state of any daemon of the host that is cleaned up.
            (Some(host), None) if host.path == "/run/kubelane" => {
                let own = config.with_file_name("sockets");
                fs::create_dir_all(&own).unwrap();
                own
            }
            (Some(host), None) => {
                // As the kubelet does.
                if host.type_.as_deref() == Some("DirectoryOrCreate") {
                    fs::create_dir_all(&host.path).unwrap();
                }
                host.path.clone().into()
            }
            (None, Some(_)) => config.to_owned(),
            _ => panic!("{volume:?}"),
        };
        let read_only = if mount.read_only == Some(true) { ":ro" } else { "" };
        let follow = if mount.mount_propagation.as_deref() == Some("HostToContainer") { ":follow" } else { "" };
        format!("--bind={}:{}{read_only}{follow}", source.display(), mount.mount_path)
    };
    pod.containers[0].volume_mounts.iter().flatten().map(bind).collect()
}

/// The DaemonSet's capabilities by number (linux/capability.h).
fn capabilities(pod: &PodSpec) -> String {
    let number = |name: &String| match name.as_str() {
        "NET_ADMIN" => "12",
        "SYS_PTRACE" => "19",
        "SYS_ADMIN" => "21",
        "PERFMON" => "38",
        "BPF" => "39",
        _ => panic!("{name}"),
    };
    let context = pod.containers[0].security_context.as_ref().unwrap();
    let names = context.capabilities.as_ref().unwrap().add.as_ref().unwrap();
    format!("--capabilities={}", names.iter().map(number).collect::<Vec<_>>().join(","))
}

#[test]
fn the_binary_asks_for_no_library_and_no_file() {
    let binary = binary();
    let ldd = Command::new("ldd").arg(&binary).output().unwrap();
    let said = String::from_utf8_lossy(&ldd.stdout);
    assert!(said.contains("statically linked"), "{said}");
    if !nix::unistd::geteuid().is_root() {
        return skip("needs root: it changes the root directory");
    }
    let root = tempfile::tempdir().unwrap();
    copy(&binary, &root.path().join("kubelane"));
    let output = Command::new("chroot").arg(root.path()).args(["/kubelane", "version"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.starts_with(concat!("kubelane ", env!("CARGO_PKG_VERSION"))), "{output:?}");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "an empty directory was enough");
}

/// A name server that knows one name, in the calling thread's namespace. RFC 1035: the answer is the question, with the
/// header's bits for an answer and, for an A record, 127.0.0.1 behind it.
fn serve_names(socket: &UdpSocket) {
    let mut packet = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut packet) {
        let labels: Vec<u8> =
            BY_DNS.split('.').flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat()).chain([0]).collect();
        let end = 12 + labels.len() + 4;
        if length < end {
            return;
        }
        let is_known = packet[12..].starts_with(&labels);
        let is_a = packet[12 + labels.len()..end] == [0, 1, 0, 1];
        let mut answer = packet[..end].to_vec();
        answer[2..4].copy_from_slice(&[0x84 | (packet[2] & 1), if is_known { 0x80 } else { 0x83 }]);
        answer[4..12].copy_from_slice(&[0, 1, 0, u8::from(is_known && is_a), 0, 0, 0, 0]);
        if is_known && is_a {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
        }
        let _ = socket.send_to(&answer, from);
    }
}

/// What `overlays/k3s` has, but for where the server is: at another name, without TLS.
fn kubeconfig(cluster: &ApiCluster, name: &str) -> String {
    let objects = kustomize::build(&Path::new(REPOSITORY).join("manifests/overlays/k3s"));
    let map = objects.iter().find(|object| object["kind"] == "ConfigMap").unwrap();
    let at = fs::read_to_string(&cluster.kubeconfig).unwrap();
    let at = at.split('"').find(|part| part.starts_with("http://")).unwrap().replace("127.0.0.1", name);
    let kubeconfig = map["data"]["kubeconfig"].as_str().unwrap().replace("https://127.0.0.1:6444", &at);
    assert!(kubeconfig.contains(&at) && kubeconfig.contains("/serviceaccount/token"), "{kubeconfig}");
    kubeconfig
}

/// The root directory of the container's processes; the tests' view into what they see.
fn seen_by(daemon: &Daemon<'_>, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{path}", daemon.pid()))
}

#[test]
fn the_daemon_runs_with_the_images_files_and_the_daemonsets_mounts_and_nothing_else() {
    if let Err(reason) = preflight() {
        return skip(&format!("{reason:#}"));
    }
    let binary = binary();
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let (lab, pod) = (&cluster.lab, pod());
    let node = lab.node("node1");
    let root = lab.dir.join("image");
    image(&root, &binary, &pod);
    let config = lab.dir.join("config");
    fs::create_dir(&config).unwrap();
    let names_socket = node.host.inside(|| Ok(UdpSocket::bind("127.0.0.1:53")?)).unwrap();
    std::thread::spawn(move || serve_names(&names_socket));

    let mut contain = vec!["contain".to_owned(), format!("--root={}", root.display()), capabilities(&pod)];
    contain.extend(binds(&pod, node.pin_path.parent().unwrap(), &config));
    contain.extend(["--".to_owned(), "/kubelane".to_owned()]);
    let with = |arguments: &[&str]| contain.iter().cloned().chain(arguments.iter().map(|a| (*a).to_owned())).collect();
    let mount_point = cgroup::mount_point().unwrap();
    let hosts_cgroups = Path::new("/host").join(mount_point.strip_prefix("/").unwrap());

    let check: Vec<String> = with(&["check"]);
    let mut process =
        node.host.spawn(&lab_binary().unwrap(), &check.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut process.stdout().unwrap(), &mut said).unwrap();
    assert!(process.wait().unwrap().success(), "{said} {}", node.host.log_tail());
    assert!(said.contains(&format!("{} (every process)", hosts_cgroups.display())), "the host's own root: {said}");
    assert!(said.contains("ok    privileges") && said.contains("ok    BPF filesystem"), "{said}");

    // A laboratory's daemon keeps to its node's processes.
    let cgroup = hosts_cgroups.join(node.cgroup.strip_prefix(&mount_point).unwrap()).display().to_string();
    let pins = Path::new("/sys/fs/bpf").join(node.pin_path.file_name().unwrap()).display().to_string();
    let arguments = pod.containers[0].args.as_ref().unwrap();
    let extra = ["--cgroup", &cgroup, "--pin-path", &pins, "--hostname-override", "node1"];
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(extra).collect();
    let run: Vec<String> = with(&arguments);
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    for (name, pod_that_answers) in [(BY_DNS, "a"), (BY_FILE, "b")] {
        fs::write(config.join("kubeconfig"), kubeconfig(&cluster, name)).unwrap();
        let daemon = Daemon::start_program(lab, "node1", &lab_binary().unwrap(), &run).expect(name);
        let ready = daemon.health("/readyz").unwrap();
        assert!(ready.ends_with("\r\n\r\nok") || ready.ends_with("ok\n"), "the datapath was probed: {ready}");
        cluster.put_slice("echo", &[pod_that_answers]);
        assert!(eventually(PATIENCE, || cluster.ask(10) == all(pod_that_answers, 40)), "{name}: {}", cluster.log());
        let close_wait = Path::new("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait");
        let read = || node.host.inside(|| Ok(fs::read_to_string(close_wait)?)).unwrap();
        if close_wait.exists() {
            assert!(eventually(PATIENCE, || read() == "3600\n"), "{}: {}", read(), daemon.log());
        }
        assert!(fs::write(seen_by(&daemon, "/file"), "").is_err(), "the root file system can be written to");
        assert_eq!(fs::metadata(seen_by(&daemon, "/kubelane")).unwrap().permissions().mode() & 0o111, 0o111);
        a_namespace_that_is_named_later_is_seen(&daemon, lab);
        assert_eq!(daemon.terminate().unwrap().code(), Some(0));
    }
    assert_eq!(names(&cluster.ask(10)), ["b"], "what is pinned on the host's BPF file system outlives the container");
}

/// Where the engine keeps images and containers of tests. What a killed run left there goes with the next one.
fn engine_state() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("engine")
}

/// A command of buildah or podman, unpacked from Debian.
fn engine(arguments: &[&str]) -> Command {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let mut command = Command::new(Path::new(REPOSITORY).join("release/engine"));
    command.arg(target.join("tools/engine")).arg(engine_state()).args(arguments);
    command
}

/// Unpacks the engine, if it can be had.
fn has_engine() -> Result<(), String> {
    let unpack = Path::new(REPOSITORY).join("release/unpack");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let arguments = ["buildah", "podman", "crun"];
    let output = Command::new(unpack).arg("trixie").arg(target.join("tools/engine")).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let reason = said.lines().last().unwrap_or("release/unpack failed");
    if output.status.success() { Ok(()) } else { Err(format!("no container engine: {reason}")) }
}

/// `manifests/image/Dockerfile` as `make image` has it built, but with a binary of the tests' profile.
fn build_image(binary: &Path, name: &str) {
    fs::create_dir_all(engine_state()).unwrap();
    let stage = tempfile::tempdir_in(engine_state()).unwrap();
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    copy(binary, &stage.path().join(format!("src/target/static/{arch}/kubelane")));
    let output = engine(&["buildah", "build", "--quiet", "--timestamp=0", "--tag", name])
        .arg(format!("--file={REPOSITORY}/manifests/image/Dockerfile"))
        .arg(format!("--platform=linux/{arch}"))
        .arg(format!("--build-context=build={}", stage.path().display()))
        .arg(REPOSITORY)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The pod as options of `podman run`, with the account's directory that the kubelet mounts. The runtime's own seccomp
/// profile is in force, as with the DaemonSet's RuntimeDefault.
fn podman_options(pod: &PodSpec, bpffs: &Path, config: &Path, account: &Path) -> Vec<String> {
    let context = pod.containers[0].security_context.as_ref().unwrap();
    let capabilities = context.capabilities.as_ref().unwrap().add.as_ref().unwrap();
    assert_eq!((pod.host_network, pod.host_pid), (Some(true), Some(true)));
    assert_eq!((context.read_only_root_filesystem, context.privileged), (Some(true), Some(false)));
    let user = format!("--user={}:{}", context.run_as_user.unwrap(), context.run_as_group.unwrap());
    let mut options: Vec<String> =
        // --cgroups: the engine's own process needs no cgroup beside the laboratory's.
        ["--network=host", "--pid=host", "--cgroups=no-conmon", "--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--pids-limit=0"]
            .map(str::to_owned)
            .to_vec();
    options.extend([user, format!("--cap-add={}", capabilities.join(",")), format!("--add-host={BY_FILE}:127.0.0.1")]);
    for bind in binds(pod, bpffs, config) {
        let bind =
            bind.strip_prefix("--bind=").unwrap().replace(":ro:follow", ":ro,rslave").replace(":follow", ":rslave");
        options.push(format!("--volume={bind}"));
    }
    options.push(format!("--volume={}:/var/run/secrets/kubernetes.io/serviceaccount:ro", account.display()));
    options
}

#[test]
fn the_daemon_runs_in_a_container_of_a_real_engine_with_the_daemonsets_security_context() {
    if let Err(reason) = preflight().map_err(|reason| format!("{reason:#}")).and_then(|()| has_engine()) {
        return skip(&reason);
    }
    let binary = binary();
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let (lab, pod) = (&cluster.lab, pod());
    let node = lab.node("node1");
    let _ = fs::remove_dir_all(engine_state());
    let name = format!("localhost/kubelane-test:{}", std::process::id());
    build_image(&binary, &name);

    let (config, account) = (lab.dir.join("config"), lab.dir.join("account"));
    for directory in [&config, &account] {
        fs::create_dir(directory).unwrap();
    }
    fs::write(config.join("kubeconfig"), kubeconfig(&cluster, BY_FILE)).unwrap();
    fs::write(account.join("token"), "a-token").unwrap();
    copy(&Path::new(REPOSITORY).join("tests/data/ca.crt"), &account.join("ca.crt"));

    let mount_point = cgroup::mount_point().unwrap();
    let of_node = node.cgroup.strip_prefix(&mount_point).unwrap();
    let pins = Path::new("/sys/fs/bpf").join(node.pin_path.file_name().unwrap()).display().to_string();
    let pid_file = lab.dir.join("container.pid");
    let mut run = vec!["podman".to_owned(), "run".to_owned(), "--rm".to_owned()];
    run.push(format!("--pidfile={}", pid_file.display()));
    run.push(format!("--cgroup-parent=/{}", of_node.display()));
    run.extend(podman_options(&pod, node.pin_path.parent().unwrap(), &config, &account));
    run.push(name.clone());
    run.extend(pod.containers[0].args.clone().unwrap());
    // release/engine shows the engine cgroup2 alone.
    let cgroup = Path::new("/host/sys/fs/cgroup").join(of_node).display().to_string();
    run.extend(["--cgroup", &cgroup, "--pin-path", &pins, "--hostname-override", "node1"].map(str::to_owned));
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    let command = engine(&run);
    let arguments: Vec<&str> = command.get_args().map(|argument| argument.to_str().unwrap()).collect();

    let daemon = Daemon::start_program(lab, "node1", Path::new(command.get_program()), &arguments).unwrap();
    cluster.put_slice("echo", &["b"]);
    assert!(eventually(PATIENCE, || cluster.ask(10) == all("b", 40)), "{}", cluster.log());
    let container: u32 = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    let status = fs::read_to_string(format!("/proc/{container}/status")).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!(field("Seccomp:"), "2", "the engine's filter of system calls is in force");
    assert_eq!(u64::from_str_radix(&field("CapBnd:"), 16).unwrap(), 1 << 12 | 1 << 19 | 1 << 21 | 1 << 38 | 1 << 39);
    let root = PathBuf::from(format!("/proc/{container}/root"));
    assert!(fs::write(root.join("file"), "").is_err(), "the root file system can be written to");
    let mut files: Vec<_> = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    files.sort_unstable();
    assert_eq!(files, ["dev", "etc", "host", "kubelane", "proc", "run", "sys", "var"], "nothing else is in the image");

    assert_eq!(daemon.terminate().unwrap().code(), Some(0));
    assert_eq!(names(&cluster.ask(10)), ["b"], "what is pinned on the host's BPF file system outlives the container");
    fs::remove_dir_all(engine_state()).unwrap();
}

/// The kubelet's next pod: a mount on the host below /run/netns, made after the daemon's start.
fn a_namespace_that_is_named_later_is_seen(daemon: &Daemon<'_>, lab: &Lab) {
    let name = format!("{}-later", lab.pod("a").netns().file_name().unwrap().to_str().unwrap());
    netns::ip(None, &[format!("netns add {name}")]).unwrap();
    let path = netns::path(&name);
    let inode = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    let (there, here) = (inode(&seen_by(daemon, path.to_str().unwrap())), inode(&path));
    netns::delete(&[name]);
    assert!(here.is_some() && there == here, "{there:?} instead of {here:?}");
}

#[test]
fn without_a_bpf_file_system_on_the_host_the_daemon_does_not_hide_one_in_its_container() {
    if let Err(reason) = preflight() {
        return skip(&format!("{reason:#}"));
    }
    let directory = tempfile::tempdir().unwrap();
    let cgroup = cgroup::mount_point().unwrap();
    // The shell is the first process of a PID namespace; what it starts has mounts of its own, and nothing at
    // /sys/fs/bpf.
    let script = format!(
        "umount -l /sys/fs/bpf 2> /dev/null; exec unshare --mount {} run --source dir:{} --cgroup {} \
         --healthz-bind-address '' --metrics-bind-address '' --devices no-such-device",
        env!("CARGO_BIN_EXE_kubelane"),
        directory.path().display(),
        cgroup.display(),
    );
    let script = format!("{script} & wait $!");
    let output = Command::new("unshare")
        .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &script])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("no BPF file system at /sys/fs/bpf, and one mounted in this container would disappear with it"),
        "{said}"
    );
}
