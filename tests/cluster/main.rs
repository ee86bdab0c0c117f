//! kubelane in the place of kube-proxy: the same answers, its rules read and taken over, the image, the monitoring. Needs
//! root.

#[path = "../laboratory/mod.rs"]
mod laboratory;

mod differential;
mod image;
mod kube_proxy_rules;
mod monitoring;
mod shadow;
mod takeover;
