//! HTTP/1.1 and JSON over a Unix socket: every route is one command to the
//! controller. Parses and answers, decides nothing. Run by `daemon`; spoken to
//! by `client`, curl and Prometheus.

use std::future::Future;
use std::io;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post, put};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;

use super::command::{ApiError, Command, Commands};
use super::metrics;
use super::types::{ErrorBody, FdbFilter, FdbSpec, PortSpec, VniSpec, WriteMode};

/// The interface as an OpenAPI document.
pub const OPENAPI: &str = include_str!("../../openapi.yaml");

/// Answer requests until `stop` is ready, then finish the ones under way.
/// Fails when the socket does.
pub async fn serve(
    listener: UnixListener,
    commands: Commands,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    axum::serve(listener, router(commands))
        .with_graceful_shutdown(stop)
        .await
}

/// Every route: method, path, handler. `openapi.yaml` lists the same.
fn routes() -> Vec<(&'static str, &'static str, MethodRouter<Commands>)> {
    vec![
        ("get", "/v1/status", get(status)),
        ("get", "/v1/vnis", get(vni_show)),
        ("post", "/v1/vnis", post(vni_add)),
        ("delete", "/v1/vnis/{vni}", delete(vni_del)),
        ("get", "/v1/ports", get(port_show)),
        ("post", "/v1/ports", post(port_add)),
        ("delete", "/v1/ports/{name}", delete(port_del)),
        ("get", "/v1/fdb", get(fdb_show)),
        ("post", "/v1/fdb", post(fdb_add)),
        ("put", "/v1/fdb", put(fdb_replace)),
        ("delete", "/v1/fdb/{vni}/{mac}", delete(fdb_del)),
        ("get", "/v1/remotes", get(remote_show)),
        ("get", "/v1/stats", get(stats)),
        ("post", "/v1/resync", post(resync)),
        ("post", "/v1/unload", post(unload)),
        ("get", "/v1/openapi.yaml", get(openapi)),
        ("get", "/metrics", get(prometheus)),
    ]
}

/// Every route as "method path", for the comparison with `openapi.yaml`.
#[cfg(test)]
pub(super) fn route_names() -> impl Iterator<Item = String> {
    routes()
        .into_iter()
        .map(|(method, path, _)| format!("{method} {path}"))
}

fn router(commands: Commands) -> Router {
    let mut router = Router::new();
    for (_, path, handler) in routes() {
        router = router.route(path, handler);
    }
    router
        .fallback(async |uri: axum::http::Uri| {
            let text = format!("there is no {}: see /v1/openapi.yaml", uri.path());
            Failure(ApiError::not_found(text))
        })
        .method_not_allowed_fallback(async || {
            let body = ErrorBody {
                error: "no such method here: see /v1/openapi.yaml".into(),
            };
            (StatusCode::METHOD_NOT_ALLOWED, axum::Json(body))
        })
        .with_state(commands)
}

/// An `ApiError` on its way out.
struct Failure(ApiError);

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.kind.http_status())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (
            status,
            axum::Json(ErrorBody {
                error: self.0.message,
            }),
        )
            .into_response()
    }
}

type Answer<T> = Result<axum::Json<T>, Failure>;
type Done = Result<StatusCode, Failure>;

fn answer<T: Serialize>(result: Result<T, ApiError>) -> Answer<T> {
    Ok(axum::Json(result?))
}

fn done(result: Result<(), ApiError>) -> Done {
    result?;
    Ok(StatusCode::NO_CONTENT)
}

/// The body as a request; the error names field, line and column.
fn body<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|error| ApiError::bad_request(format!("request body: {error}")))
}

/// A part of the path as a value.
fn segment<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, ApiError> {
    text.parse()
        .map_err(|error: T::Err| ApiError::bad_request(error.to_string()))
}

async fn status(State(commands): State<Commands>) -> impl IntoResponse {
    answer(commands.ask(Command::Status).await)
}

async fn vni_show(State(commands): State<Commands>) -> impl IntoResponse {
    answer(commands.ask(Command::VniShow).await)
}

async fn vni_add(State(commands): State<Commands>, bytes: Bytes) -> Done {
    let spec: VniSpec = body(&bytes)?;
    spec.check()
        .map_err(|error| ApiError::bad_request(error.to_string()))?;
    done(commands.ask(|reply| Command::VniAdd(spec, reply)).await)
}

async fn vni_del(State(commands): State<Commands>, Path(vni): Path<String>) -> Done {
    let vni = segment(&vni)?;
    done(commands.ask(|reply| Command::VniDel(vni, reply)).await)
}

async fn port_show(State(commands): State<Commands>) -> impl IntoResponse {
    answer(commands.ask(Command::PortShow).await)
}

async fn port_add(State(commands): State<Commands>, bytes: Bytes) -> Done {
    let spec: PortSpec = body(&bytes)?;
    done(commands.ask(|reply| Command::PortAdd(spec, reply)).await)
}

async fn port_del(State(commands): State<Commands>, Path(name): Path<String>) -> Done {
    let name = segment(&name)?;
    done(commands.ask(|reply| Command::PortDel(name, reply)).await)
}

async fn fdb_show(
    State(commands): State<Commands>,
    RawQuery(query): RawQuery,
) -> impl IntoResponse {
    let filter = fdb_filter(query.as_deref().unwrap_or(""))?;
    answer(commands.ask(|reply| Command::FdbShow(filter, reply)).await)
}

/// `vni=N&mac=MAC`, both optional. Neither value has characters that would be
/// percent-encoded, apart from the colon, which clients may encode.
fn fdb_filter(query: &str) -> Result<FdbFilter, ApiError> {
    let mut filter = FdbFilter::default();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("vni", vni)) => filter.vni = Some(segment(vni)?),
            Some(("mac", mac)) => {
                let mac = mac.replace("%3A", ":").replace("%3a", ":");
                filter.mac = Some(segment(&mac)?);
            }
            _ => {
                let text = format!("`{pair}` is no filter: there are vni=N and mac=MAC");
                return Err(ApiError::bad_request(text));
            }
        }
    }
    Ok(filter)
}

async fn fdb_add(State(commands): State<Commands>, bytes: Bytes) -> Done {
    fdb_write(&commands, &bytes, WriteMode::Add).await
}

async fn fdb_replace(State(commands): State<Commands>, bytes: Bytes) -> Done {
    fdb_write(&commands, &bytes, WriteMode::Replace).await
}

async fn fdb_write(commands: &Commands, bytes: &Bytes, mode: WriteMode) -> Done {
    let spec: FdbSpec = body(bytes)?;
    done(
        commands
            .ask(|reply| Command::FdbWrite(spec, mode, reply))
            .await,
    )
}

async fn fdb_del(
    State(commands): State<Commands>,
    Path((vni, mac)): Path<(String, String)>,
) -> Done {
    let (vni, mac) = (segment(&vni)?, segment(&mac)?);
    done(commands.ask(|reply| Command::FdbDel(vni, mac, reply)).await)
}

async fn remote_show(State(commands): State<Commands>) -> impl IntoResponse {
    answer(commands.ask(Command::RemoteShow).await)
}

async fn stats(State(commands): State<Commands>) -> impl IntoResponse {
    answer(commands.ask(Command::Stats).await)
}

async fn resync(State(commands): State<Commands>) -> impl IntoResponse {
    answer(commands.ask(Command::Resync).await)
}

async fn unload(State(commands): State<Commands>) -> Done {
    done(commands.ask(Command::Unload).await)
}

async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/yaml")], OPENAPI)
}

async fn prometheus(State(commands): State<Commands>) -> Result<Response, Failure> {
    let status = commands.ask(Command::Status).await?;
    let stats = commands.ask(Command::Stats).await?;
    let text = metrics::text(status, stats);
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}
