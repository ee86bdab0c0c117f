//! What the repository says of itself: documents, manifests, the chart, figures. Needs nothing.

#[path = "../laboratory/mod.rs"]
mod laboratory;

mod chart;
mod documents;
mod figures;
mod manifests;
mod manual;
