// The demo's report: one HTML file without any external resource, for light and dark screens, wide and narrow.

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "demo.h"
#include "svg.h"
#include "table.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

constexpr const char* kHead = R"html(<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Tokenyard demo</title>
<style>
:root{--page:#f4f6f9;--card:#fff;--ink:#1b2330;--soft:#5a6676;--line:#dfe4eb;--heat:#2563d9;--good:#12805c;--bad:#c0342b;
--on:#fff;--embed:#7d8a9c;--route:#a83f90;--dispatch:#2f6fde;--experts:#c96a14;--combine:#178a66}
@media(prefers-color-scheme:dark){:root{--page:#0c1016;--card:#141a23;--ink:#e7ecf3;--soft:#98a5b6;--line:#293342;--heat:#6aa2ff;
--good:#4fd0a5;--bad:#ff8a80;--on:#0c1016;--embed:#77859a;--route:#e58bd0;--dispatch:#6aa2ff;--experts:#f5a65b;--combine:#4fd0a5}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 18px 48px}
h1{font-size:1.65rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.1rem;margin:0 0 .2rem}
p{margin:.1rem 0 .8rem;color:var(--soft)}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin-top:16px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 14px}
.tile b{display:block;font-size:1.4rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.85rem}
.good{color:var(--good)}.bad{color:var(--bad)}
.ranks{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:18px 28px}
.rank header{display:flex;justify-content:space-between;font-size:.88rem;margin-bottom:5px}
.rank header span{color:var(--soft);font-variant-numeric:tabular-nums}
.cells{display:grid;grid-template-columns:repeat(16,1fr);gap:2px}
.cells i{position:relative;aspect-ratio:1;border-radius:3px;background:var(--line);overflow:hidden}
.cells i::before{content:"";position:absolute;inset:0;background:var(--heat);opacity:var(--v)}
.scale{display:flex;align-items:center;gap:8px;margin-top:14px;color:var(--soft);font-size:.82rem;white-space:nowrap}
.scale i{width:130px;height:10px;border-radius:5px;background:linear-gradient(90deg,var(--line),var(--heat))}
.scroll{overflow-x:auto}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:0 16px}
table{border-collapse:separate;border-spacing:3px;font-variant-numeric:tabular-nums;font-size:.9rem}
th{font-weight:500;color:var(--soft);text-align:right;padding:5px 8px;white-space:nowrap}
th:first-child{text-align:left;padding-left:0}
td{position:relative;text-align:right;padding:7px 9px;border-radius:6px;white-space:nowrap;overflow:hidden}
td::before{content:"";position:absolute;inset:0;background:var(--heat);opacity:calc(var(--v)*.45)}
td span{position:relative}
.self{border:1px dashed var(--soft)}.self::before{display:none}
.plain td,.plain th{padding:4px 12px 4px 0}
.plain td::before{display:none}
.plain{border-spacing:0}
svg{display:block;min-width:700px;width:100%;height:auto}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
svg .soft{fill:var(--soft)}
svg .on{fill:var(--on);font-size:11.5px}
svg .grid{stroke:var(--line)}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.85rem;color:var(--soft);margin-bottom:10px}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
@media(max-width:560px){main{padding:20px 10px 36px}section{padding:14px 12px}table{font-size:.82rem}td{padding:6px 5px}
.plain td,.plain th{padding:4px 8px 4px 0}svg{min-width:620px}}
footer{color:var(--soft);font-size:.82rem;margin-top:20px}
</style>
</head>
<body><main>
)html";

std::string tile(const std::string& value, const std::string& label, const char* css = "") {
  return fmt::format("<div class=\"tile\"><b class=\"{}\">{}</b><span>{}</span></div>\n", css, escaped(value), escaped(label));
}

std::string tiles(const json& report) {
  const json& checks = report["checks"];
  const json& load = report["load_summary"];
  const bool ok = checks["ok"];
  const double copies = load["expert_rows"];
  double busiest = 0;
  for (const json& rank : report["load"]) busiest = std::max(busiest, rank["expert_rows"].get<double>());
  return "<div class=\"tiles\">\n" +
         tile(ok ? "all correct" : "wrong", fmt::format("{} output rows checked", count_text(checks["outputs_checked"])),
              ok ? "good" : "bad") +
         tile(count_text(report["text"]["bytes"]), "tokens, one per byte of text") +
         tile(fmt::format("{:.2f} x", copies / report["rows_sent"].get<double>()), "fewer rows sent: once per rank, not per expert") +
         tile(fmt::format("{:.1f} x", load["busiest_expert_of_mean"].get<double>()),
              fmt::format("the mean load on the busiest expert, {}", load["busiest_expert"].get<int>())) +
         tile(fmt::format("{:.2f} x", busiest / load["mean_expert_rows_per_rank"].get<double>()), "the mean load on the busiest rank") +
         tile(time_text(report["seconds"].get<double>() * 1e6), "for everything, checks included") + "</div>\n";
}

std::string heat_map(const json& report) {
  const double busiest = std::max(report["load_summary"]["busiest_expert_rows"].get<double>(), 1.0);
  const double mean = report["load_summary"]["mean_rows_per_expert"];
  std::string out =
      "<section><h2>Load: rank x expert</h2>\n<p>Rows that each expert received; a cell is an expert, in the order of their numbers.</p>\n"
      "<div class=\"ranks\">\n";
  int rank = 0;
  for (const json& load : report["load"]) {
    const auto counts = load["rows_per_expert"].get<std::vector<std::int64_t>>();
    int expert = load["first_expert"];
    const std::string experts =
        counts.empty() ? "no experts" : fmt::format("experts {} to {}", expert, expert + static_cast<int>(counts.size()) - 1);
    out += fmt::format("<div class=\"rank\"><header><b>rank {}</b><span>{}, {} rows</span></header><div class=\"cells\">", rank, experts,
                       count_text(load["expert_rows"]));
    for (const std::int64_t count : counts) {
      out += fmt::format("<i style=\"--v:{:.3f}\" title=\"expert {} on rank {}: {} rows, {:.2f} x the mean\"></i>",
                         static_cast<double>(count) / busiest, expert, rank, count_text(count), static_cast<double>(count) / mean);
      ++expert;
    }
    out += "</div></div>\n";
    ++rank;
  }
  return out + fmt::format("</div><div class=\"scale\">0<i></i>{} rows (mean {})</div></section>\n",
                           count_text(static_cast<std::int64_t>(busiest)), count_text(std::llround(mean)));
}

std::string link_matrix(const json& report) {
  const json& links = report["link_bytes"];
  double most = 1;
  for (const json& row : links) {
    for (const json& bytes : row) most = std::max(most, bytes.get<double>());
  }
  std::string out =
      "<section><h2>Bytes per link</h2>\n<p>Sent by each rank (line) to each rank (column), dispatch and combine together. Dashed: stays "
      "on "
      "its rank.</p>\n<div class=\"scroll\"><table><tr><th>from</th>";
  for (std::size_t rank = 0; rank < links.size(); ++rank) out += fmt::format("<th>to {}</th>", rank);
  out += "</tr>\n";
  for (std::size_t from = 0; from < links.size(); ++from) {
    out += fmt::format("<tr><th>rank {}</th>", from);
    for (std::size_t to = 0; to < links.size(); ++to) {
      const std::int64_t bytes = links[from][to];
      out += fmt::format("<td class=\"{}\" style=\"--v:{:.3f}\" title=\"{} bytes\"><span>{}</span></td>", from == to ? "self" : "",
                         static_cast<double>(bytes) / most, count_text(bytes), bytes_text(bytes));
    }
    out += "</tr>\n";
  }
  return out + "</table></div></section>\n";
}

// The layer's phase that a span belongs to, which gives its color: "dispatch counts" is part of dispatch.
std::string color_of(const std::string& phase) { return phase.substr(0, phase.find_first_of(" _")); }

constexpr double kLaneHeight = 52, kTop = 24, kLeft = 56, kRight = 985;

double duration_us(const json& span) { return span["end_us"].get<double>() - span["begin_us"].get<double>(); }

std::string rect(const json& span, double x, double width, double opacity) {
  const bool inner = span["inner"];
  const double y = kTop + span["rank"].get<double>() * kLaneHeight + (inner ? 30 : 4);
  return fmt::format(
      "<rect x=\"{:.2f}\" y=\"{:.1f}\" width=\"{:.2f}\" height=\"{}\" rx=\"2\" fill=\"var(--{})\" opacity=\"{}\">"
      "<title>rank {}, {}{}: {}</title></rect>\n",
      x, y, std::max(width, 0.6), inner ? 8 : 24, color_of(span["phase"]), opacity, span["rank"].get<int>(),
      inner ? "inside the exchange: " : "", escaped(span["phase"]), time_text(duration_us(span)));
}

// The steps inside the exchange get shades in turn; bars with room for it say how long they are.
std::string span_bars(const json& spans, double end_us) {
  constexpr double kRoomForText = 62;
  std::string out;
  int inner_count = 0;
  for (const json& span : spans) {
    const bool inner = span["inner"];
    const std::string phase = span["phase"];
    if (inner && color_of(phase) == phase) continue;  // the whole call, which the outer bar shows
    const double x = kLeft + (kRight - kLeft) * span["begin_us"].get<double>() / end_us;
    const double width = (kRight - kLeft) * duration_us(span) / end_us;
    out += rect(span, x, width, !inner ? 1.0 : inner_count++ % 2 == 0 ? 0.85 : 0.45);
    if (inner || width < kRoomForText) continue;
    out += fmt::format("<text class=\"on\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>\n", x + width / 2,
                       kTop + span["rank"].get<double>() * kLaneHeight + 20, time_text(duration_us(span)));
  }
  return out;
}

double linear_step(double end_us) {
  const double magnitude = std::pow(10, std::floor(std::log10(end_us / 6)));
  for (const double step : {1.0, 2.0, 5.0}) {
    if (end_us / (step * magnitude) <= 8) return step * magnitude;
  }
  return 10 * magnitude;
}

std::string timeline(const json& report) {
  double end_us = 1;
  for (const json& span : report["timeline"]) end_us = std::max(end_us, span["end_us"].get<double>());
  const double bottom = kTop + kLaneHeight * static_cast<double>(report["load"].size());
  std::string out =
      "<section><h2>One batch in time</h2>\n<p>The middle batch on every rank; the thin bars are the steps inside the exchange (hover for "
      "names). "
      "Uneven experts make the others wait in combine.</p>\n<div class=\"key\">";
  for (const char* phase : {"embed", "route", "dispatch", "experts", "combine"}) {
    out += fmt::format("<span><i style=\"background:var(--{0})\"></i>{0}</span>", phase);
  }
  out += fmt::format("</div>\n<div class=\"scroll\"><svg viewBox=\"0 0 1000 {:.0f}\" role=\"img\" aria-label=\"phases of one batch\">\n",
                     bottom + 8);
  const double step = linear_step(end_us);
  for (double tick = 0; tick <= end_us; tick += step) {
    const double x = kLeft + (kRight - kLeft) * tick / end_us;
    out += fmt::format(
        "<line class=\"grid\" x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1}\" y2=\"{2:.0f}\"/>"
        "<text class=\"soft\" x=\"{0:.1f}\" y=\"14\" text-anchor=\"middle\">{3:g} ms</text>\n",
        x, kTop, bottom, tick / 1e3);
  }
  for (std::size_t rank = 0; rank < report["load"].size(); ++rank) {
    out += fmt::format("<text x=\"4\" y=\"{:.0f}\">rank {}</text>\n", kTop + kLaneHeight * static_cast<double>(rank) + 21, rank);
  }
  out += span_bars(report["timeline"], end_us);
  return out + "</svg></div></section>\n";
}

std::string phases(const json& report) {
  std::string out = fmt::format(
      "<section><h2>Time per phase</h2>\n<p>Per batch the slowest rank, over {} batches. Ranks share this machine's {} cores.</p>\n<div "
      "class=\"scroll\"><table class=\"plain\"><tr><th>phase</th><th>min</th><th>median</th><th>max</th></tr>\n",
      report["batches"].get<int>(), report["machine"]["cores"].get<int>());
  for (const json& phase : report["phases"]) {
    out += fmt::format("<tr><th>{}</th><td>{}</td><td>{}</td><td>{}</td></tr>\n", phase["phase"].get<std::string>(),
                       time_text(phase["min_us"]), time_text(phase["median_us"]), time_text(phase["max_us"]));
  }
  return out + "</table></div></section>\n";
}

std::string footer(const json& report) {
  const json& checks = report["checks"];
  const json& settings = report["settings"];
  return fmt::format(
      "<footer><p>Checked: {} rows at experts, {}. Outputs: {}; largest error {:.1e}, {:.1e} allowed, of {}.</p>\n"
      "<p>Rows of {} {}, expert width {}, seed {}. {}, {} cores, {}. tokenyard {} ({}).</p></footer>\n",
      count_text(checks["rows_checked"]), escaped(checks["rows"]), escaped(checks["outputs"]), checks["largest_error"].get<double>(),
      checks["tolerance"].get<double>(), escaped(checks["tolerance_of"]), settings["hidden_size"].get<int>(),
      settings["dtype"].get<std::string>(), settings["expert_width"].get<int>(), settings["seed"].get<int>(),
      escaped(report["machine"]["cpu"]), report["machine"]["cores"].get<int>(), escaped(report["versions"]["compiler"]),
      report["versions"]["tokenyard"].get<std::string>(), report["versions"]["git_revision"].get<std::string>());
}

}  // namespace

std::string demo_html(const json& report) {
  const json& preset = report["preset"];
  std::string out = kHead;
  out += fmt::format(
      "<h1>{} bytes of text through a Mixture-of-Experts layer</h1>\n<p>{} on {} ranks: every byte is a token that visits {} of {} "
      "experts ({} routing). Text: {}.</p>\n",
      count_text(report["text"]["bytes"]),
      report["checks"]["ok"].get<bool>() ? "Dispatched, computed, combined and verified" : "Not correct", report["load"].size(),
      preset["top_k"].get<int>(), preset["experts"].get<int>(), escaped(preset["name"]), escaped(report["text"]["source"]));
  if (!report["checks"]["ok"].get<bool>()) out += "<p class=\"bad\">" + escaped(report["checks"]["fault"]) + "</p>\n";
  out += tiles(report) + heat_map(report) + timeline(report);
  out += "<div class=\"pair\">" + link_matrix(report) + phases(report) + "</div>" + footer(report);
  return out + "</main></body></html>\n";
}

}  // namespace tokenyard::cli
