//! Makes worlds of any size as files: Services of one port, each with one EndpointSlice.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// The size of a world.
#[derive(Clone, Copy, Debug)]
pub struct World {
    pub services: usize,
    /// Endpoints of each Service.
    pub endpoints: usize,
}

impl World {
    /// One file per Service, holding the Service and its EndpointSlice.
    pub fn write_files(self, directory: &Path) -> std::io::Result<()> {
        for number in 0..self.services {
            let text = format!("{}---\n{}", service(number), self.slice(number, 0));
            fs::write(directory.join(format!("service-{number:05}.yaml")), text)?;
        }
        Ok(())
    }

    /// The whole world in `files` files, each one `List`.
    pub fn write_lists(self, directory: &Path, files: usize) -> std::io::Result<()> {
        for file in 0..files {
            let mut text = String::from("apiVersion: v1\nkind: List\nitems:\n");
            for number in (file..self.services).step_by(files) {
                item(&mut text, &service(number));
                item(&mut text, &self.slice(number, 0));
            }
            fs::write(directory.join(format!("list-{file}.yaml")), text)?;
        }
        Ok(())
    }

    /// The EndpointSlice of a Service; another `version` has another first endpoint.
    pub fn slice(self, number: usize, version: usize) -> String {
        let mut text = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: service-{number:05}-abcde\n  \
             namespace: bench\n  labels:\n    kubernetes.io/service-name: service-{number:05}\naddressType: IPv4\nports:\n\
             - name: http\n  port: 8080\n  protocol: TCP\nendpoints:\n"
        );
        for endpoint in 0..self.endpoints {
            let pod = number * self.endpoints + endpoint;
            let third = if endpoint == 0 { 250 + version % 5 } else { pod % 250 };
            let _ = write!(
                text,
                "- addresses:\n  - 10.{}.{}.{third}\n  conditions:\n    ready: true\n    serving: true\n    terminating: false\n  \
                 nodeName: node-{}\n  zone: zone-{}\n",
                pod / 62_500,
                pod / 250 % 250,
                pod % 100,
                pod % 3
            );
        }
        text
    }
}

/// A Service.
pub fn service(number: usize) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: service-{number:05}\n  namespace: bench\nspec:\n  type: ClusterIP\n  \
         clusterIP: 10.{}.{}.{}\n  selector:\n    app: service-{number:05}\n  ports:\n  - name: http\n    port: 80\n    \
         targetPort: 8080\n    protocol: TCP\n",
        96 + number / 62_500,
        number / 250 % 250,
        number % 250 + 1
    )
}

fn item(text: &mut String, object: &str) {
    for (number, line) in object.lines().enumerate() {
        let _ = writeln!(text, "{}{line}", if number == 0 { "- " } else { "  " });
    }
}
