"""The page's sheet: a light and a dark scheme by the reader's own choice, one column where it is narrow."""

# The curves' colours keep apart for people who see few colours (after Okabe and Ito), and stand out on either ground.
SHEET = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--faint:#5b6470;--rule:#d5dae0;--panel:#f6f7f9;
--shade:0,96,184;--c0:#0060b8;--c1:#c44f00;--c2:#00805a;--c3:#a8348c;--c4:#8a6d00;--c5:#2a8fb8;--c6:#b3261e;--c7:#555}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ed;--faint:#a3acb7;--rule:#3a414a;--panel:#1d2127;
--shade:80,160,240;--c0:#5aaef5;--c1:#ff9a4d;--c2:#3fd0a0;--c3:#ec8fd2;--c4:#e6c84a;--c5:#86d3f2;--c6:#ff8a80;--c7:#b8b8b8}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:82rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem}
h3{font-size:1.05rem;margin:1.4rem 0 .4rem}
p{margin:.4rem 0;max-width:60rem}
.note,figcaption span,.legend,caption{color:var(--faint)}
code,pre{font:.875em/1.45 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
pre{background:var(--panel);padding:.8rem;border-radius:.4rem;overflow:auto;white-space:pre-wrap}
.plots{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,25rem),1fr))}
figure{margin:0;padding:.7rem;background:var(--panel);border-radius:.5rem;min-width:0}
figcaption{font-weight:600}
.plots svg:not(.swatch){display:block;width:100%;height:auto}
svg text{font:12px system-ui,"DejaVu Sans",sans-serif;fill:var(--faint)}
.grid{stroke:var(--rule);stroke-width:1}
.curve{fill:none;stroke-width:1.8;stroke-linejoin:round}
.dashed{stroke-dasharray:5 3;stroke-width:1.4}
path.c0,line.c0{stroke:var(--c0)}path.c1,line.c1{stroke:var(--c1)}path.c2,line.c2{stroke:var(--c2)}
path.c3,line.c3{stroke:var(--c3)}path.c4,line.c4{stroke:var(--c4)}path.c5,line.c5{stroke:var(--c5)}
path.c6,line.c6{stroke:var(--c6)}path.c7,line.c7{stroke:var(--c7)}
circle.c0{fill:var(--c0)}circle.c1{fill:var(--c1)}circle.c2{fill:var(--c2)}circle.c3{fill:var(--c3)}
circle.c4{fill:var(--c4)}circle.c5{fill:var(--c5)}circle.c6{fill:var(--c6)}circle.c7{fill:var(--c7)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0 0;padding:0;font-size:.875rem}
.swatch{width:22px;height:10px;margin-right:.35rem;vertical-align:middle}
.wide{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption{text-align:left;padding-bottom:.3rem;max-width:min(60rem,calc(100vw - 2rem))}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;max-width:32rem}
th{font-weight:600}tbody th{font-weight:400}
.figure{text-align:right;white-space:nowrap}
.confusion{width:max-content}
.confusion td,.confusion th{padding:.2rem .4rem;text-align:center;min-width:2.2rem;border:1px solid var(--rule)}
.confusion tbody th{text-align:right}
.confusion thead th{max-width:7rem;overflow-wrap:anywhere;vertical-align:bottom}
.confusion td{background:rgba(var(--shade),var(--share,0))}
.confusion td.right{outline:2px solid var(--rule);outline-offset:-2px}
.pictures{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));list-style:none;padding:0}
.pictures li{background:var(--panel);border-radius:.5rem;padding:.5rem;font-size:.85rem;line-height:1.35}
.pictures img{display:block;width:100%;height:9rem;object-fit:contain;background:rgba(127,127,127,.15);
margin-bottom:.4rem}
.pictures img.small{image-rendering:pixelated}
.pictures dl{margin:0}.pictures dt{float:left;color:var(--faint);margin-right:.35rem}.pictures dd{margin:0}
.path{color:var(--faint);font-size:.78rem}
details{margin:.5rem 0}summary{cursor:pointer}
a:focus-visible,summary:focus-visible,.wide:focus-visible{outline:2px solid var(--c0)}
@media print{body{max-width:none}figure,li{break-inside:avoid}}
"""
